"""The watch's own tables: healthy trainings, provoked failures, the automatic schedule against the one by hand."""

from pathlib import Path

import yaml

from afm_pipe.params import Params

TABLES = """
watch_healthy:
  title: The watch on healthy trainings
  question: Does an alarm go off where nothing is wrong?
  paper: null
  base: {}
  rows:
    title: training
    settings:
      "the study's base": {}
  columns: null
  seeds: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
  checks: []
watch_provoked:
  title: The watch on provoked failures
  question: Is each failure noticed, and as what it is?
  paper: null
  base: {}
  rows:
    title: training
    settings:
      healthy: {}
      transport too strong: {transport: {start: 5.0, end: 5.0}}
      "no transport, no penalty": {transport: {start: 0.0, end: 0.0}, penalty: {weight: 0.0}}
      "D learns 50 times as fast": {phases: [{until_epoch: 8, lr: 2.0e-5, lr_discriminator: 1.0e-3}]}
      "penalties rare, one forward pass": {reuse_forward: true, penalty: {every: 4}}
  columns: null
  seeds: [0, 1, 2]
  checks:
    - claim: Too strong a transport is noticed
      measure: alarms
      less: {rows: [healthy]}
      than: {rows: [transport too strong]}
    - claim: Divergence without transport and penalty is noticed
      measure: alarms
      less: {rows: [healthy]}
      than: {rows: ["no transport, no penalty"]}
    - claim: Stagnation under a discriminator that wins is noticed
      measure: alarms
      less: {rows: [healthy]}
      than: {rows: ["D learns 50 times as fast"]}
    - claim: Mode collapse is noticed
      measure: alarms
      less: {rows: [healthy]}
      than: {rows: ["penalties rare, one forward pass"]}
auto_schedule:
  title: Schedules by hand and automatic
  question: Does a training without typed-in epochs become as good as one with?
  paper: null
  base: {}
  rows:
    title: schedule
    settings:
      by hand: {}
      automatic: {schedule: auto, phases: [{until_epoch: 16}]}
  columns: null
  seeds: [0, 1, 2]
  checks:
    - claim: The schedule by hand makes better samples than the automatic one
      measure: distance
      less: {rows: [by hand]}
      than: {rows: [automatic]}
"""


def test_the_watchs_tables_are_valid_params() -> None:
    raw = yaml.safe_load((Path(__file__).parents[1] / "profiles" / "study.yaml").read_text())
    params = Params.model_validate(raw | {"tables": yaml.safe_load(TABLES)})
    assert {name: len(cells) for name, cells in params.cells.items()} == {
        "watch_healthy": 10,
        "watch_provoked": 15,
        "auto_schedule": 6,
    }
    healthy = [cell.run for cell in params.cells["watch_healthy"]]
    assert healthy[:3] == [cell.run for cell in params.cells["auto_schedule"] if cell.row == "by hand"], "trained once"
