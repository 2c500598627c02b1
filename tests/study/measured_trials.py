"""A table of two short trials on discs, and what its trials left."""

import json

from afm_pipe.distributed.launch import Launch
from afm_pipe.runtime import paths

ONE = Launch(device="cpu", workers=1)
TABLE = """
title: Transport
question: Does it matter?
paper: null
base: {}
rows: {title: lambda_ot, settings: {"0.2": {}, "0": {transport: {start: 0.0, end: 0.0}}}}
columns: null
seeds: [0]
checks: [{claim: It does, measure: distance, less: {rows: ["0.2"]}, than: {rows: ["0"]}}]
"""
BASE = "{size: s4, phases: [{until_epoch: 2}, {until_epoch: 4, lr: 3.0e-4}]}"
KEY = "fd_classifier_20"


def trials(name: str) -> dict[str, dict]:
    return {trial["row"]: trial for trial in json.loads(paths.table(name).read_text())["trials"]}


def trainings() -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in paths.TRIALS.glob("*/trained.json")}


def measurements() -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in paths.TRIALS.glob("results/*.json")}


def with_row(label: str, overrides: str) -> str:
    return TABLE.replace('"0": {transport', f'"{label}": {overrides}, "0": {{transport')
