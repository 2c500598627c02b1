"""The report: its page, built from fabricated inputs and read back."""

import csv
import json
import math
from pathlib import Path

import pytest

from afm_pipe.evaluation.networks import LEGACY, METRIC_NAMES, SPATIAL
from afm_pipe.reporting import curves, tables, titles
from afm_pipe.reporting.page import write_report
from afm_pipe.reporting.tables import setting_text
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from tests.reporting.report_inputs import (
    COMMITTED,
    built,
    make_params,
    write,
    write_curve,
    write_inputs,
    write_picture,
)


def test_tables_list_exactly_the_runs_params_name(project: Path) -> None:
    write_inputs(make_params(a={}, removed={}, b={"lr": 5.0e-4}))
    page = built(make_params(b={"lr": 5.0e-4}, a={}))
    assert [row[0] for row in page.rows["table-runs tbody"]] == ["b", "a"]
    assert [row[0] for row in page.rows["table-costs tbody"]] == ["b", "a"]
    assert "removed" not in page.text
    with (paths.RENDERED / "runs.csv").open(newline="") as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["b", "a"]


def test_numbers_are_printed_short_and_stored_in_full(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    page = built(params)
    titles_shown = page.rows["table-runs thead"][0]
    row = dict(zip(titles_shown, page.rows["table-runs tbody"][0], strict=True))
    assert row["FD-5k (classifier)"] == "8.12"
    assert row["Class accuracy"] == "97.8 %"
    assert row["Training time"] == "2.58 min"
    with (paths.RENDERED / "runs.csv").open(newline="") as file:
        assert float(next(csv.DictReader(file))["fd_classifier_5k"]) == 8.1234
    markdown = (paths.RENDERED / "runs.md").read_text()
    assert "| t4 | end | 8.12 |" in markdown


def test_rows_say_which_weights_were_measured(project: Path) -> None:
    params = make_params(a={}, b={})
    write_inputs(params)
    sizes = {"generator_parameters": 1, "discriminator_parameters": 1}
    selection = {"of": 8, "samples": 1000, "update": 70, "epoch": 7.0, "distance": 9.5}
    write(paths.model("b") / "config.json", sizes | {"selection": selection})
    shown = {row[0]: row[1] for row in built(params).rows["table-runs tbody"]}
    assert shown == {"a": "end", "b": "best of 8, chosen on FD (classifier) of 1,000 samples"}


def test_the_distance_that_chose_weights_is_that_of_the_first_network(project: Path) -> None:
    params = make_params(a={})
    write_inputs(params)
    stored = json.loads(paths.metrics("a").read_text())
    write(paths.metrics("a"), stored | {"fid_5k": 20.0, "kid_5k": 0.1})
    write(paths.model("a") / "config.json", {"generator_parameters": 1, "selection": {"of": 8, "samples": 1000}})
    for networks, title in {("classifier", LEGACY): "FD (classifier)", (LEGACY, "classifier"): "FID"}.items():
        evaluate = params.evaluate.model_copy(update={"features": networks})
        (row,) = built(params.model_copy(update={"evaluate": evaluate})).rows["table-runs tbody"]
        assert row[1] == f"best of 8, chosen on {title} of 1,000 samples"


@pytest.mark.parametrize("network", METRIC_NAMES)
def test_keys_of_metrics_tell_their_network(network: str) -> None:
    names = METRIC_NAMES[network]
    assert titles.distance_in(network) == names.distance or network == SPATIAL
    own = {names.distance, *(f"{kind}{names.suffix}" for kind in ("kid", "sw", "recall") if names.suffix is not None)}
    for key in own:
        for shown in (key, f"{key}_1k", f"ratio_{key}_500"):
            assert [each for each in METRIC_NAMES if titles.is_of_network(shown, each)] == [network]
    assert not titles.is_of_network("within_class_variance", network)


def test_runs_whose_settings_have_changed_since_training_are_named(project: Path) -> None:
    params = make_params(a={}, b={"lr": 5.0e-4})
    write_inputs(params)
    for name, run in params.models.items():
        sizes = {"generator_parameters": 1, "discriminator_parameters": 1}
        write(paths.model(name) / "config.json", sizes | {"run": run.model_dump(mode="json")})
    assert "Params have changed" not in built(params).text
    changed = make_params(a={}, b={"lr": 6.0e-4})
    assert "changed since these runs were trained: b. Run `dvc repro`." in built(changed).text
    assert [
        "Params have changed since this run was trained" in (paths.REPORT / "runs" / f"{name}.html").read_text()
        for name in ("a", "b")
    ] == [False, True]


def test_settings_in_which_runs_differ_stand_under_their_titles(project: Path) -> None:
    params = make_params(a={"lr": 1.0e-3}, b={"lr": 5.0e-4, "penalty": {"weight": 0.5}})
    write_inputs(params)
    page = built(params)
    first, second = (
        dict(zip(page.rows["table-runs thead"][0], row, strict=True)) for row in page.rows["table-runs tbody"]
    )
    assert (first["Learning rate"], first["Penalty weight"]) == ("0.001", "0.25")
    assert (second["Learning rate"], second["Penalty weight"]) == ("0.0005", "0.5")


def test_each_metric_links_to_the_file_it_was_read_from(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    links = {link["title"]: link["href"] for link in built(params).all("a") if "title" in link}
    assert links["results/metrics/t4.json: fd_classifier_5k = 8.1234"] == "../../results/metrics/t4.json"
    assert links["reference/summary.json: fd_classifier_reconstruction = 3.14"] == "../../reference/summary.json"
    for href in links.values():
        assert (paths.REPORT / str(href)).is_file()


def test_internal_links_have_targets_and_ids_are_unique(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    page = built(params)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    local = {str(link["href"])[1:] for link in page.all("a") if str(link["href"]).startswith("#")}
    assert local <= set(ids)
    files = [str(link["href"]) for link in page.all("a") if not str(link["href"]).startswith("#")]
    assert files
    assert all((paths.REPORT / href).is_file() for href in files)


def test_page_fetches_nothing_and_describes_every_picture(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    page = built(params)
    assert "http://" not in page.text
    assert "https://" not in page.text
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "base")
        assert not (attributes.get("src") or "").strip() or str(attributes["src"]).startswith("data:")
        if tag == "link":
            assert str(attributes["href"]).startswith("data:")
        if tag == "img":
            assert len(attributes["alt"] or "") > 20
        if tag == "svg" and attributes.get("role") == "img":
            assert "over images seen" in (attributes["aria-label"] or "")
    assert len(page.all("img")) == 4 + 3 * len(params.runs)
    assert "url(" not in (paths.REPORT / "index.html").read_text().split("</style>")[0]


def test_summary_names_the_lowest_run_the_floor_and_the_scale(project: Path) -> None:
    params = make_params(worse={"lr": 5.0e-4}, better={})
    write_inputs(params)
    write(paths.metrics("worse"), json.loads(paths.metrics("worse").read_text()) | {"fd_classifier_5k": 44.0})
    write(paths.metrics("better"), json.loads(paths.metrics("better").read_text()) | {"fd_classifier_5k": 7.7})
    text = built(params).text
    assert "7.70" in text
    assert f"{COMMITTED['evaluate']['samples']:,} samples each in the data's class shares." in text
    assert "run better, one seed, the lowest; one seed ranks nothing; reconstructed real images have 3.14" in text
    assert "not comparable with the paper's ImageNet numbers: 5,000 training images instead of 1,281,167" in text
    assert "the classifier is right on 97.0 % of real images that it never saw" in text


def test_samples_are_compared_with_held_out_images_where_there_are_any(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    summary = json.loads((paths.REFERENCE / "summary.json").read_text())
    write(paths.REFERENCE / "summary.json", summary | {"held_out": {"images": 500, "class_accuracy": 0.81}})
    assert "the classifier is right on 81.0 % of real images that it never saw" in built(params).text


def test_class_names_are_text_never_markup(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    page = built(params)
    assert "b" not in {tag for tag, _ in page.elements}
    assert any('"><b>&nine' in str(image["alt"]) for image in page.all("img"))


def test_a_run_of_other_classes_than_the_real_images_is_refused(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    config = paths.model("t4") / "config.json"
    write(config, json.loads(config.read_text()) | {"classes": ["airplane"]})
    with pytest.raises(UserError, match="Found 'airplane' as class 0 of 1 in models/t4, expected "):
        built(params)


def test_published_numbers_stand_in_their_own_tables_only(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    page = built(params)
    one_step = page.rows["table-paper_one_step tbody"]
    assert ["AFM XL/2paper", "1", "673", "125", "cg+da", "2.38", "", ""] in [[*row[:6], "", ""] for row in one_step]
    epochs = f"{params.runs['t4'].phases[-1].until_epoch:g}"
    assert one_step[0][:6] == ["t4ours", "1", "1.23", epochs, "none", titles.MISSING]  # FID was not measured
    assert one_step[0][6] == "8.12"
    assert page.rows["table-published_transport_penalty tbody"][1][3] == "53.90 ± 1"
    assert page.rows["table-published_transport_decay tbody"][1] == ["cosine 0.2 → 0.01", "8.51"]
    assert not any("AFM" in cell for row in page.rows["table-runs tbody"] for cell in row)


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("results/metrics/t4.json", "evaluate@t4"),
        ("results/curves/t4.csv", "train@t4"),
        ("results/costs/t4.json", "train@t4"),
        ("samples/t4/grid.png", "sample@t4"),
        ("reference/summary.json", "reference"),
        ("models/autoencoder", "autoencoder"),
    ],
)
def test_missing_input_names_the_file_and_its_stage(project: Path, path: str, stage: str) -> None:
    params = make_params()
    write_inputs(params)
    Path(path).rename("elsewhere")
    with pytest.raises(UserError, match=f"{path}.*dvc repro {stage}"):
        write_report(params, paths.REPORT, paths.RENDERED)
    assert not paths.REPORT.exists()


@pytest.mark.parametrize(
    ("path", "content", "words"),
    [
        ("results/costs/t4.json", b'{"machine": "x"}', "results/costs/t4.json with a wrong device"),
        (
            "results/curves/t4.csv",
            b"update,images\n1,many\n",
            "t4.csv with 1 damaged line, the first is line 2",
        ),
        ("results/curves/t4.csv", b"update,images\n", "no rows"),
        ("results/metrics/t4.json", b'{"fid_5k": 3.0}', "results/metrics/t4.json with a wrong protocol"),
        ("results/metrics/t4.json", b'{"protocol": {}}', "it has no metrics"),
        ("results/metrics/t4.json", b'{"fid_5k": 1e999, "protocol": {}}', "fid_5k is not finite"),
        ("samples/t4/grid.png", b"\x89PNG\r\n\x1a\n cut short", "no complete PNG"),
    ],
)
def test_damaged_input_is_a_clear_error(project: Path, path: str, content: bytes, words: str) -> None:
    params = make_params()
    write_inputs(params)
    Path(path).write_bytes(content)
    with pytest.raises(UserError, match=words):
        write_report(params, paths.REPORT, paths.RENDERED)


def test_same_inputs_give_the_same_bytes(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    for folder in ("first", "second"):
        write_report(params, Path(folder), Path(folder, "tables"))
    names, again = (
        sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
        for folder in ("first", "second")
    )
    assert names == again
    assert {"index.html", "runs/t4.html", "tables/runs.csv", "samples.png"} <= set(names)
    for name in names:
        assert Path("first", name).read_bytes() == Path("second", name).read_bytes()


def test_heavy_pictures_are_made_smaller(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    for name in params.runs:
        for kind in ("grid", "nearest", "interpolation"):
            write_picture(paths.samples(name) / f"{kind}.png", 0, side=1300)  # noise: 5 MB each as PNG
    built(params)
    assert (paths.REPORT / "index.html").stat().st_size < 3e6


def test_curve_breaks_where_a_run_diverged_and_missing_metrics_are_dashes(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    write_curve(paths.curves("t4"), 0, 40, broken=None)
    with_gap = Path("gap.csv")
    write_curve(with_gap, 0, 40, broken=20)
    rows = with_gap.read_text().splitlines()
    rows[21] = rows[21].replace("nan", "1300", 2).replace("1300", "21", 1)  # update and images stay known
    paths.curves("t4").write_text("\n".join(rows) + "\n")
    stored = json.loads(paths.metrics("t4").read_text())
    write(paths.metrics("t4"), stored | {"fd_classifier_5k": None})
    page = built(params)
    assert page.rows["table-runs tbody"][0][2] == titles.MISSING
    gap = next(svg for svg in page.all("path") if "--run-0" in str(svg["style"]) and len(str(svg["d"])) > 100)
    assert str(gap["d"]).count("M") == 2
    assert "nan" not in str(gap["d"])


def test_long_curves_are_averaged_to_the_mean_of_their_bins() -> None:
    curve = {"images": [float(i) for i in range(1000)], "lr": [float(i % 2) for i in range(1000)]}
    images, values = curves._points(curve, "lr")
    assert len(images) == curves.MAX_POINTS
    assert values == pytest.approx(0.5, abs=0.1)
    assert images[0] == pytest.approx(2.5, abs=0.6)


def test_settings_shown_are_those_in_which_runs_differ() -> None:
    params = make_params(a={}, b={"transport": 0.2, "penalty": {"weight": 0.5}})
    found = tables.differing_settings(list(params.runs.values()))
    assert list(found) == ["penalty.weight", "transport"]
    assert tables.setting_text("transport", found["transport"][1]) == "0.2 constant"
    assert tables.differing_settings([params.runs["a"]]) == {}


@pytest.mark.parametrize(
    ("value", "text"),
    [(8.1, "8.10"), (9.999, "10.0"), (1250, "1,250"), (1_281_167, "1,281,167"), (328.7, "329"), (0.0, "0")]
    + [(0.012345, "0.0123"), (1.23e-5, "1.23e-5"), (-0.00123, "-0.00123"), (None, "–"), (math.inf, "not finite")],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert titles.number(value) == text


def test_only_inception_distances_are_called_fid() -> None:
    assert titles.metric("fid_5k").title == "FID-5k"
    assert titles.metric("fid").title == "FID"
    assert titles.metric("kid_clean_1234").title == "KID-1234 (clean)"
    for key in ("fd_classifier_5k", "kid_classifier_5k", "fd_dinov2", "kid_dinov2"):
        assert "FID" not in titles.metric(key).title
    assert titles.metric("kid_classifier_5k").title == "KID-5k (classifier)"
    assert titles.metric("kid_dinov2").title == "KID (dinov2)"


def test_a_phase_says_all_that_is_done_in_it() -> None:
    phase = {"until_epoch": 10.0, "lr": 3e-4, "guidance": {"scale": 0.02}, "augment": {"probability": 0.4}}
    later = {"until_epoch": 12.0, "reload_ema": "epoch", "reload_discriminator": 8.0, "gradient_clip": 5.0}
    found = setting_text("phases", [phase, later])
    expected = "10 at lr 0.0003, guided by 0.02, augmented, then 12, clipped at 5, EMA reload, D reload from 8"
    assert found == expected
