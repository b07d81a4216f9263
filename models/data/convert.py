"""The command `convert`: rows of another layout become a manifest.

The same command again writes the same. A file that holds something else is not written over without `--overwrite`.
"""

from __future__ import annotations

import io
import sys

from models.data.commands import convert_parser
from models.data.manifest import header_with_root, manifest_bytes, refuse_other_file, refuse_other_rows, write_manifest
from models.data.problems import refuse_if_all_bad
from models.data.readers import read_foreign, row_files
from models.data.streaming import stream_into_manifest


def main(argv: list[str] | None = None) -> int:
    """The command `convert`: one message and status 1 if the file cannot be converted."""
    arguments = convert_parser().parse_args(argv)
    try:
        if arguments.out.exists():
            for file in row_files(arguments.rows, arguments.form):
                if file.exists() and arguments.out.samefile(file):
                    raise ValueError(f"--out: expected another file than the rows, got {str(arguments.out)!r}")
        options = {
            name: getattr(arguments, name) for name in ("form", "audio_root", "split", "max_bad_fraction", "allow_links")
        }
        if arguments.streaming:
            said = stream_into_manifest(arguments.rows, arguments.out, overwrite=arguments.overwrite, **options)
        else:
            kept = arguments.out.exists() and not arguments.overwrite
            if kept:
                refuse_other_file(arguments.out)
            manifest = read_foreign(arguments.rows, **options)
            refuse_if_all_bad(arguments.rows, manifest.problems, len(manifest))
            header = header_with_root(manifest.header, audio_root=manifest.audio_root, folder=arguments.out.parent)
            if kept:
                refuse_other_rows(arguments.out, io.BytesIO(manifest_bytes(manifest.examples, header=header)))
            write_manifest(arguments.out, manifest.examples, header=header)
            said = manifest.summary()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(said)
    print(arguments.out)
    return 0
