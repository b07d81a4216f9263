"""Arguments of `report`."""

from __future__ import annotations

from models.arguments import Parser


def report_parser() -> Parser:
    parser = Parser(prog="python -m models report", description="Write stored results as one HTML or Markdown page.")
    parser.add_argument("--out", default="report.html", help="HTML file to write")
    parser.add_argument("--markdown", metavar="FILE", help="Markdown file to write as well, with a folder for figures and clips")
    parser.add_argument("--title", default="Evaluation", help="title of the page")
    parser.add_argument(
        "--results", metavar="DIR", help="folder of stored results (default without --predictions: models/experiments/results)"
    )
    parser.add_list("--predictions", metavar="LABEL=FILE", help="what python -m models evaluate wrote about one system")
    parser.add_argument("--reference", metavar="LABEL", help="the system others are compared with (default: the first)")
    parser.add_list("--metrics", nargs="*", metavar="LABEL=FILE", help="metrics.jsonl of a training run")
    parser.add_argument("--manifest", help="manifest of the clips to listen to; it needs --predictions")
    parser.add_argument("--audio-root", help="folder of the audio (default: the folder of the manifest)")
    parser.add_allow_links()
    parser.add_argument("--max-clips", type=int, default=8, help="clips to embed, of at most 30 s each")
    return parser
