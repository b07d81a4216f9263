"""A small report that has everything in it: stored results, predictions, curves and clips."""

import numpy as np

from models.data.audio import write_audio
from models.data.manifest import Example
from models.evaluation.predictions import Prediction
from models.reporting.report import Report
from models.reporting.results_csv import curves_csv

KINDS = ("neutral", "aligned", "conflict")
HOSTILE = r"$\frac{$ <script>alert(1)</script> | [x](javascript:1) ![i](http://a.b) `c` *d* https://e.f www.g.h --> ]]>"


def examples(count=4):
    return [
        Example(
            id=f"c{i}/{kind}", audio=f"c{i}.wav", transcription=f"<b>line {i}</b>", task="gender", question="Who & what?",
            choices=("man", "woman"), answer=("man", "woman")[i % 2], split="test", kind=kind, pair_id=f"c{i}",
            context="" if kind == "neutral" else "Note: the speaker is a <man>.",
        )
        for i in range(count) for kind in KINDS
    ]  # fmt: skip


def predictions(right):
    made = []
    for n, e in enumerate(examples()):
        other = "woman" if e.answer == "man" else "man"
        text = e.answer if right(n, e) else other
        for control in ("", "no_audio") if e.kind == "neutral" else ("",):
            made.append(
                Prediction(
                    id=e.id + ("#" + control if control else ""), task=e.task, kind=e.kind, answer=e.answer, choices=e.choices,
                    prediction=f"The speaker is a {text}.", pair_id=e.pair_id, control=control,
                )
            )  # fmt: skip
    return made


def make_report(folder):
    """Predictions of two systems on four clips of half a second, one training curve."""
    for i in range(4):
        write_audio(folder / f"c{i}.wav", 0.1 * np.sin(np.arange(8000) / 9).astype(np.float32))
    curve = [{"step": s, "loss": 1 / s, "kd": 2 / s, "seconds": 1.0} for s in (1, 2, 3)]
    return Report(
        title="A <title>",
        findings=["CAAD < KD"],
        systems={
            "always right": predictions(lambda n, e: True),
            "follows hints": predictions(lambda n, e: e.kind != "conflict" or e.id == "c0/conflict"),
        },
        curves={"run": curve},
        examples=examples(),
        audio_root=folder,
        facts=[("Settings", [("a<b", 1)])],
    )


SIX = """\
system,label,seed,alpha,all,neutral,aligned,conflict,irrelevant,shift_tir_adv,strict,follows_hint,no_audio,task_gender_neutral,\
task_speaking_rate_neutral,task_gender_conflict,latency_ms,torch,commit,date
teacher,"teacher, greedy",0,0,0.70,0.86,0.99,0.22,0.80,0.74,0.69,0.70,0.5,0.9,0.8,0.2,180,2.13,abc,2026-11-25
before,student before,0,0,0.60,0.80,0.90,0.30,0.78,0.60,0.58,0.60,0.5,0.8,0.7,0.3,90,2.13,abc,2026-11-25
before,student before,1,0,0.62,0.82,0.92,0.34,0.76,0.58,0.60,0.56,,0.8,0.7,0.3,90,2.13,abc,2026-11-25
kd,standard KD,0,0,0.64,0.83,0.96,0.44,0.78,0.47,0.62,0.50,0.5,0.8,0.7,0.4,90,2.13,abc,2026-11-25
kd,standard KD,1,0,0.66,0.85,0.94,0.48,0.79,0.45,0.64,0.48,,0.8,0.7,0.4,90,2.13,abc,2026-11-25
caad2,CAAD alpha 2,0,2,0.74,0.88,0.90,0.80,0.80,0.08,0.73,0.16,0.5,0.9,0.8,0.8,90,2.13,abc,2026-11-25
caad2,CAAD alpha 2,1,2,0.76,0.86,0.88,0.82,0.82,0.10,0.75,0.14,,0.9,0.8,0.8,90,2.13,abc,2026-11-25
"""
SWEEPS = "sweep,value,system,seed,all,neutral,aligned,conflict,shift_tir_adv\n" + "".join(
    f"{sweep},{value},{system},0,0.7,0.8,0.9,{conflict},0.3\n"
    for sweep, values in (("alpha", (0.5, 2)), ("anchor", ("teacher", "metadata")), ("conflict_strength", (0, 1)))
    for value in values
    for system, conflict in ((("kd", 0.4), ("caad2", 0.8)) if sweep != "alpha" else (("caad", 0.6),))
)
PAIRED = """\
system,minus,context,difference,low,high,answers,seeds
caad2,kd,all,0.1,0.05,0.15,40,2
caad2,kd,conflict,0.36,0.3,0.42,10,2
caad2,kd,aligned,-0.06,-0.1,-0.02,10,2
"""


def write_results(folder):
    """All files that a report knows, but for those of the demo."""
    folder.mkdir(exist_ok=True)
    sources = "system,label,seed,perception,content,all,conflict,task_gender\n"
    sources += "".join(f"{s},{s.upper()},{seed},0.6,0.5,0.55,0.4,0.7\n" for s in ("sft", "caad") for seed in range(3))
    runs = {("kd", "standard KD", seed): [{"step": s, "loss": seed + 1 / s} for s in (1, 2)] for seed in (0, 1)}
    for name, text in (
        ("six_systems", SIX), ("sweeps", SWEEPS), ("six_systems_paired", PAIRED), ("sources_layers", sources),
        ("training", curves_csv(runs)),
    ):  # fmt: skip
        (folder / f"{name}.csv").write_text(text)
    return folder
