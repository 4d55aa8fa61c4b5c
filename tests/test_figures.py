"""The efficiency figures: true shapes, limits that are kept, claims judged by what was measured, and a report that stands alone."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the rivals' shapes are transformers', of the extra [hf]")
import transformers
from accelerate import init_empty_weights

from zamba2.bench import figures, peers
from zamba2.bench.figures import CLAIMS, OURS, Point, Settings, medians, run, verdicts
from zamba2.bench.peers import BeyondLimits, DoesNotFit, Limits, Worker
from zamba2.bench.report import PLOTS, lines, write_report
from zamba2.bench.rivals import RIVALS, parameters, random_model
from zamba2.cli import run as command
from zamba2.commands.figures import seconds
from zamba2.config import PRESETS
from zamba2.errors import Zamba2Error

RIVAL = pytest.mark.parametrize("rival", RIVALS)
PUBLISHED = {"phi-2": 2.78, "phi-3-mini": 3.82, "stablelm-3b": 2.80, "gemma-2-2b": 2.61, "danube-4b": 3.96, "mistral-7b": 7.24}
QUICK = (
    "figures", "--small", "--models", "phi-3-mini", "--formats", "q4", "--formats", "bf16", "--engines", "zamba2",
    "--engines", "transformers", "--prompt-tokens", "9", "--batches", "1", "--new-tokens", "2", "--threads", "1", "--repeats", "1",
)  # fmt: skip
SMALL = Settings(models=("phi-3-mini",), formats=("q4",), engines=("zamba2",), lengths=(9, 20), batches=(), new_tokens=2, small=True)


# ---- the rivals ------------------------------------------------------------------------------------------------------


@RIVAL
def test_true_shapes(rival: str) -> None:
    """A rival has as many parameters as published, and exactly as many in transformers as in the file for llama.cpp."""
    shape = dict(RIVALS[rival].shape)
    config = transformers.AutoConfig.for_model(shape.pop("model_type"), **shape)
    with init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    count = sum(weight.numel() for weight in model.parameters())
    assert parameters(RIVALS[rival].gguf) == count
    assert count / 1e9 == pytest.approx(PUBLISHED[rival], rel=0.005) == pytest.approx(RIVALS[rival].parameters)


def test_a_shape_has_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that llama.cpp reads are written once for a shape; one that was corrected does not run those of before."""
    monkeypatch.setattr(peers, "llama_cpp_folder", lambda: tmp_path)
    monkeypatch.setattr(peers, "llama_cpp_python", lambda: Path("python"))
    monkeypatch.setattr(peers, "write_by", lambda command: Path(command[-1]).write_text(command[-2]))
    spec = RIVALS["phi-2"].gguf
    files = [Path(peers.llama_cpp(found)[-1]) for found in (spec, {**spec, "layers": 2}, spec)]
    assert [json.loads(file.read_text())["layers"] for file in files] == [32, 2, 32] and len(set(files)) == 2


@pytest.mark.parametrize("rival", [*RIVALS, OURS])
def test_random_weights(rival: str) -> None:
    """A random model has a spread of 0.02 in its matrices, gives finite logits that depend on all that was read, and keeps ties."""
    shape = figures.shape_of(rival, Settings(small=True))
    model = random_model(shape, torch.float32)
    assert type(model).__module__.startswith("transformers.")
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            assert weight.std().item() == pytest.approx(0.02, rel=0.1), name
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == shape["tie_word_embeddings"]
    ids = torch.tensor([[5, 6, 7, 8], [9, 6, 7, 8]])
    with torch.inference_mode():
        first, second = model(ids).logits[:, -1]
    assert torch.isfinite(first).all() and not torch.equal(first, second)
    assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3, pad_token_id=0).shape == (2, 7)


# ---- measuring -------------------------------------------------------------------------------------------------------


def quick(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    assert command([*QUICK, *arguments]) == 0, capsys.readouterr().err
    found = capsys.readouterr()
    return json.loads(found.out.splitlines()[-1]), found.err


def test_a_whole_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every point of every series is measured in finite positive numbers; plots, page and document are there; a second try adds what is
    missing and no more; other settings are refused with what is there left alone."""
    out, begun = tmp_path / "figures", time.monotonic()
    results, said = quick(capsys, "--out", str(out))
    assert sum(entry["runs"][0]["seconds"] for entry in results["points"]) < results["seconds"] < time.monotonic() - begun
    assert [entry["status"] for entry in results["points"]] == ["measured"] * 6
    points = list(itertools.product([Point(9, 1), Point(128, 1)], [one["name"] for one in results["series"]]))
    assert [(Point(entry["prompt_tokens"], entry["batch"]), entry["series"]) for entry in results["points"]] == points
    for entry in results["points"]:
        (run,) = entry["runs"]
        assert all(0 < value < math.inf for value in run.values()), run
    assert len(re.findall(r"^\d of 6: .*first token", said, re.MULTILINE)) == 6
    assert json.loads((out / "figures.json").read_text()) == results
    names = {f"{name}-{bits}-bit.{kind}" for name in ("first-token", "next-token", "memory") for bits in (4, 16) for kind in ("png", "svg")}
    assert {path.name for path in out.iterdir()} == names | {"figures.json", "report.html"}

    assert quick(capsys, "--out", str(out), "--json")[0]["points"] == results["points"]
    results, said = quick(capsys, "--out", str(out), "--repeats", "2", "--models", "phi-3-mini")  # named twice is named once
    assert len(re.findall(r"^\d+ of 12: .*first token", said, re.MULTILINE)) == 6  # those of the second round
    assert {len(entry["runs"]) for entry in results["points"]} == {2}
    document = (out / "figures.json").read_bytes()
    assert command([*QUICK, "--out", str(out), "--new-tokens", "3"]) == 2
    assert "other settings (new_tokens)" in capsys.readouterr().err and (out / "figures.json").read_bytes() == document


def test_ours_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs, our PyTorch model in bf16, answers to the same lines with the same figures."""
    from zamba2.weights.hub import RANDOM

    request = {"path": str(RANDOM), "device": "cpu", "prompt_tokens": 20, "batch": 2, "new_tokens": 2}
    worker = Worker("ours", [sys.executable, "-m", "zamba2.bench.measure", json.dumps(request)], quiet=True)
    try:
        assert worker.ask("warm") == {}
        found = worker.ask("repeat")
    finally:
        worker.close()
    assert found["ttft_seconds"] > 0 and found["decode_tokens_per_second"] > 0


def measured(settings: Settings, out: Path, synthetic: Callable[..., Path], **limits: Any) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    given = {"budget": 600.0, "memory": 1e12, "repeats": 1} | limits
    return run(settings, out, synthetic=synthetic, say=lambda line, done, total: said.append(line), **given), said


def nothing(*_: Any) -> Path:
    raise AssertionError("nothing is to be made")


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    """A model whose weights are larger than the memory allowed is never started, and the report says so."""
    settings = Settings(engines=("zamba2", "transformers"), formats=("q4", "bf16"), lengths=(64, 128), batches=())
    results, said = measured(settings, tmp_path, nothing, memory=1e9)
    assert {entry["status"] for entry in results["points"]} == {"does not fit"} and len(said) == len(results["points"])
    assert any("mistral-7b" in line and "its weights alone take 14.5 GB and 1.0 GB are allowed" in line for line in said)
    assert measured(settings, tmp_path, nothing, memory=1.05e9)[1] == []  # not worth another try
    allowed = {entry["allowed_bytes"] for entry in measured(settings, tmp_path, nothing, memory=1.2e9)[0]["points"]}
    assert allowed == {1.2e9}
    assert measured(settings, tmp_path, nothing, memory=1e9)[0]["points"][0]["reason"].endswith("1.2 GB are allowed")
    page = write_report(results, tmp_path).read_text()
    assert "its weights alone take 14.5 GB" in page and not list(tmp_path.glob("*.png"))
    assert [verdict.text for verdict in verdicts(results)] == ["not measured"] * len(CLAIMS)


def test_no_time_is_said(tmp_path: Path) -> None:
    """Without time nothing is started; with it, what will not end within it is not either, and the next try measures it, but not on another
    machine or GPU."""
    results, _ = measured(SMALL, tmp_path, nothing, budget=0.0)
    assert {(entry["status"], entry["reason"]) for entry in results["points"]} == {("not measured", "0 s of the time were left")}
    one = results["series"][0]["name"]
    results["points"][0]["runs"].append({"ttft_seconds": 40.0, "seconds": 50.0, "decode_tokens_per_second": 1.0, "peak_rss_bytes": 1})
    (series,) = figures.all_series(SMALL)
    assert series.name == one
    # 9 tokens took 50 s, of which reading 40; 20 tokens: 50 + 40 * (20 / 9 - 1), and a quarter more
    assert figures.expected(results, series, Point(20, 1)) == pytest.approx(1.25 * (50 + 40 * 11 / 9))
    assert figures.expected(results, series, Point(9, 1)) == pytest.approx(1.25 * 50)
    assert figures.expected(results, series, Point(8, 1)) == 0
    (tmp_path / "figures.json").write_text(json.dumps(results))
    results, said = measured(SMALL, tmp_path, nothing, budget=60.0)
    assert results["points"][1]["reason"] == "it would take about 124 s and 60 s of the time were left" and len(said) == 1
    for other in ({"machine": "another"}, {"gpu": "another"}):
        (tmp_path / "figures.json").write_text(json.dumps(results | other))
        with pytest.raises(Zamba2Error, match=r"or another machine \(another\)"):
            measured(SMALL, tmp_path, nothing, budget=60.0)


def test_versions_are_not_mixed(tmp_path: Path) -> None:
    """Figures of another version of what is measured are not gone on with; what has been installed since is named from then on."""
    results, _ = measured(SMALL, tmp_path, nothing, budget=0.0)
    file, version = tmp_path / "figures.json", results["versions"].pop("torch")
    file.write_text(json.dumps(results))
    assert measured(SMALL, tmp_path, nothing, budget=0.0)[0]["versions"]["torch"] == version
    file.write_text(json.dumps(results | {"versions": {"torch": "1.0"}}))
    with pytest.raises(Zamba2Error, match=r"holds figures of other versions \(torch 1\.0\)"):
        measured(SMALL, tmp_path, nothing, budget=0.0)


@pytest.mark.parametrize(("device", "asked"), [("cpu", ["warm", "repeat"]), ("cuda", ["repeat", "repeat"])])
def test_nothing_of_a_warm_up_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, asked: list[str]) -> None:
    """A GPU's kernels are compiled and captured for a length of prompt: its warm-up is one of the length that is measured."""
    said: list[str] = []

    def ask(line: str) -> dict[str, float]:
        said.append(line)
        return {"ttft_seconds": 1.0 / len(said), "decode_tokens_per_second": 1.0, "peak_rss_bytes": 1}

    monkeypatch.setattr(figures, "gpu_name", lambda _: "a GPU")
    monkeypatch.setattr(figures, "Worker", lambda *_, **__: SimpleNamespace(ask=ask, close=lambda: None, ready={"load_seconds": 1.0}))
    settings = replace(SMALL, device=device, lengths=(9,))
    results, _ = measured(settings, tmp_path, lambda *_: tmp_path)
    assert said == asked and [run["ttft_seconds"] for run in results["points"][0]["runs"]] == [0.5]


def test_limits_of_a_process() -> None:
    """A process that takes more memory than it may, or goes on when the time is up, is stopped, and which of both is said."""
    hungry = "print('{}', flush=True); input(); held = bytearray(400_000_000); input()"
    worker = Worker("hungry", [sys.executable, "-c", hungry], limits=Limits(memory=2e8), quiet=True)
    with pytest.raises(DoesNotFit, match=r"took more than the 0\.2 GB that it may"):
        worker.ask("repeat")
    worker.close()
    with pytest.raises(BeyondLimits, match="stopped when the time was up") as error:
        Worker("slow", [sys.executable, "-c", "import time; time.sleep(60)"], limits=Limits(end=time.monotonic() + 0.3), quiet=True)
    assert not isinstance(error.value, DoesNotFit)


@pytest.mark.parametrize(
    ("program", "status", "reason"),
    [
        ("import sys; sys.exit('the reason')", "failed", "ended with exit code 1; it said last: the reason"),
        ("pass", "failed", "ended with exit code 0; it said nothing."),
        ("print('{\"error\": \"no such model\"}')", "failed", "no such model"),
        ("print('{\"does not fit\": \"CUDA out of memory\"}')", "does not fit", "CUDA out of memory"),
    ],
)
def test_a_failure_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, status: str, reason: str) -> None:
    """A measurement that fails is written down with what its process said, and the next one is begun."""
    monkeypatch.setattr(figures, "command_of", lambda *_: [sys.executable, "-c", program])
    results, said = measured(SMALL, tmp_path, lambda *_: tmp_path)
    assert len(said) == 2
    for entry in results["points"]:
        assert entry["status"] == status and reason in entry["reason"]


# ---- what it says ----------------------------------------------------------------------------------------------------


def document(**ratios: list[float]) -> dict[str, Any]:
    """Results in which each rival takes so many times what ours does, at 100, 200, ... tokens, in all measures."""
    lengths = [100 * (i + 1) for i in range(max(map(len, ratios.values())))]
    settings = Settings(models=tuple(ratios), formats=("bf16",), engines=("zamba2", "transformers"), lengths=tuple(lengths), batches=())
    series = figures.all_series(settings)
    entries = []
    for point, one in itertools.product(settings.points, series):
        times = 1.0 if one.model == OURS else ratios[one.model][lengths.index(point.prompt_tokens)]
        runs = [
            {"ttft_seconds": times * noise, "decode_tokens_per_second": 4 / times / noise, "peak_rss_bytes": int(1e9 * times)}
            for noise in (1.0, 0.5, 3.0)
            if times
        ]
        entries.append({"series": one.name, **point._asdict(), "status": "measured", "reason": None, "runs": runs})
    about = [{**figures.asdict(one), "name": one.name, "bits": one.bits} for one in series]
    return {
        "version": 1, "machine": "a machine", "gpu": None, "versions": {}, "seconds": 60.0, "settings": figures.asdict(settings),
        "series": about, "points": entries,
    }  # fmt: skip


def test_claims_are_judged_by_ratios() -> None:
    """A claim holds where theirs over ours is what it says, at each length for itself; nothing is said of what was not measured."""
    results = document(**{"phi-3-mini": [2.5, 1.3, 1.0], "phi-2": [0.9, 0.5, 0.0]})
    fast = {"ttft_seconds": 1e-9, "decode_tokens_per_second": 1e9, "peak_rss_bytes": 1}
    results["points"] += [entry | {"batch": 4, "runs": [fast]} for entry in results["points"]]  # several sequences at once are no claim's
    found = {v.claim.text: v for v in verdicts(results)}
    first, memory, latency, disputed = found.values()
    assert first.text == "holds at 100 tokens, not at 200, 300"
    assert memory.text == "holds at 100 tokens, not at 200, 300"  # 27 % less: 1.37 times
    assert latency.text == "holds at 100, 200 tokens, not at 300"
    assert disputed.text == "holds here" and disputed.ratios == pytest.approx({100: 0.9, 200: 0.5})
    assert first.ratios == pytest.approx({100: 2.5, 200: 1.3, 300: 1.0})


def test_medians() -> None:
    """Of three runs the middle one counts, but for memory the largest; a reply is the first token and all behind it."""
    entry = {"batch": 2, "runs": [
        {"ttft_seconds": t, "decode_tokens_per_second": r, "peak_rss_bytes": m} for t, r, m in ((1.0, 4.0, 7), (9.0, 1.0, 9), (2.0, 5.0, 8))
    ]}  # fmt: skip
    assert medians(entry, 10) == {
        "ttft_seconds": 2.0, "token_seconds": 0.5, "reply_seconds": 7.0, "tokens_per_second": 4.0, "memory_bytes": 9,
    }  # fmt: skip
    assert medians({"batch": 1, "runs": []}, 10) is None


def test_lines_hold_one_thing_still() -> None:
    """By tokens of prompt a line is of one sequence, by sequences of one length, in the unit that is shown and of its own bits."""
    results = document(**{"phi-2": [1.0, 2.0]})
    results["settings"] |= {"lengths": [100, 200], "batches": [1, 2], "batch_length": 200}
    results["points"] += [entry | {"batch": 2} for entry in results["points"]]
    results["points"] += [entry | {"prompt_tokens": 300} for entry in results["points"]]  # of other settings
    found = {}
    for plot in PLOTS:
        found[plot.name] = {series["model"]: points for series, points in lines(results, plot, 16)}["phi-2"]
        assert list(lines(results, plot, 4)) == []
    assert found == {
        "first-token": [(100, 1.0), (200, 2.0)], "next-token": [(100, 250.0), (200, 500.0)],
        "memory": [(100, pytest.approx(1.0)), (200, pytest.approx(2.0))], "throughput": [(1, 2.0), (2, 2.0)],
    }  # fmt: skip


def test_the_report_stands_alone(tmp_path: Path) -> None:
    """The page loads nothing, shows every plot, names and number, hides what would be markup, and is the same for the same results."""
    results = document(**{name: [1.0 + i / 8, 2.0] for i, name in enumerate(RIVALS)}) | {"machine": "<script>alert(1)</script>"}
    results["points"][0]["runs"].pop()
    page = write_report(results, tmp_path).read_text()
    assert not re.search(r"<(script|link|img|iframe)|@import|url\((?!#)|src=|href=\"(?!#)", page)
    assert page.count("<svg") == page.count("</svg>") == 3 and page.count("<figure") == 3
    assert "&lt;script&gt;" in page and 'name="viewport"' in page
    assert all(name in page for name in RIVALS) and "only a trial" not in page
    assert "1 minutes of measuring" in page and "medians of up to 3 rounds" in page
    colours = {(kind, text) for kind, text in re.findall(r'<td class="text (yes|no|)">([^<]*)</td></tr>', page) if " at " not in text}
    assert {("yes", "holds here"), ("no", "does not hold here")} >= colours != set()
    pictures = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(pictures) == 7
    write_report(results, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == pictures


def test_drawn_again(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--again draws a document of before into another folder and measures nothing."""
    results = json.loads(json.dumps(document(**{"phi-2": [1.0, 2.0]})))
    (tmp_path / "old.json").write_text(json.dumps(results))
    assert command(["figures", "--again", str(tmp_path / "old.json"), "--out", str(tmp_path / "new"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == results
    assert (tmp_path / "new" / "report.html").exists() and not (tmp_path / "new" / "figures.json").exists()
    monkeypatch.setattr("zamba2.commands.figures.find_spec", lambda name: None)  # as after `pip install .`
    assert command(["figures", "--again", str(tmp_path / "old.json"), "--out", str(tmp_path / "plain")]) == 0
    found = capsys.readouterr()
    assert "the plots are left out, since matplotlib is not installed" in found.err and json.loads(found.out.splitlines()[-1]) == results


# ---- one clear sentence ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--models", "gpt-4"], "--models is 'gpt-4'; there are zamba2-2.7b, phi-2, phi-3-mini"),
        (["--engines", "vllm"], "--engines is 'vllm'; there are zamba2, transformers, llama.cpp"),
        (["--formats", "q5"], "there is no format 'q5'"),
        (["--prompt-tokens", "0"], "Invalid value for '--prompt-tokens': 0 is not in the range x>=1"),
        (["--batches", "-2"], "Invalid value for '--batches': -2 is not in the range x>=1"),
        (["--repeats", "0"], "Invalid value for '--repeats': 0 is not in the range x>=1"),
        (["--threads", "0"], "Invalid value for '--threads': 0 is not in the range 1<=x<=1024"),
        (["--memory", "-1"], "--memory is -1.0 GB; more than 0 is needed"),
        (["--memory", "nan"], "--memory is nan GB; more than 0 is needed"),
        (["--budget", "soon"], "--budget is 'soon'; a time is needed, such as 90s, 30m, 2h or 1h30m"),
        (["--again", "nowhere.json"], "nowhere.json cannot be read (No such file or directory)"),
        (["--device", "cuda"], "PyTorch finds no GPU here"),
    ],
)
def test_bad_options_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    """What cannot be measured is refused with exit code 2, before anything runs or is written."""
    monkeypatch.chdir(tmp_path)
    if arguments == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert command(["figures", *arguments]) == 2
    found = capsys.readouterr()
    assert found.out == "" and said in found.err.splitlines()[-1] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', '{"version": 2}', "\x00"])
def test_bad_documents(tmp_path: Path, text: str) -> None:
    """A file that is no document of ours is refused in a sentence."""
    (tmp_path / "figures.json").write_text(text)
    with pytest.raises(Zamba2Error, match=r"no JSON document|no document of zamba2 figures"):
        figures.read_results(tmp_path / "figures.json")


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d["points"][0].pop("runs"), lambda d: d["points"][0].pop("status"), lambda d: d["points"][0].update(runs=[{}]),
        lambda d: d["points"][0]["runs"][0].update(decode_tokens_per_second=0), lambda d: d["series"][0].update(model="gpt-4"),
        lambda d: d["points"][0]["runs"][0].update(ttft_seconds=float("nan")), lambda d: d["series"][0].pop("bits"),
        lambda d: d["points"][0].update(series="nobody's"), lambda d: d["settings"].pop("lengths"), lambda d: d.update(seconds="long"),
        lambda d: d["points"].append(7), lambda d: d.update(versions=[]), lambda d: d["versions"].update(torch=2),
    ],
)  # fmt: skip
def test_damaged_documents(tmp_path: Path, damage: Callable[[dict[str, Any]], Any]) -> None:
    """A document with something missing, unknown or impossible in it is refused in a sentence, before anything is drawn."""
    found = json.loads(json.dumps(document(**{"phi-2": [1.0, 2.0]})))
    for entry in found["points"]:
        del entry["runs"][1:]  # else a median passes over what is damaged
    damage(found)
    (tmp_path / "figures.json").write_text(json.dumps(found))
    with pytest.raises(Zamba2Error, match="is damaged"):
        figures.read_results(tmp_path / "figures.json")


def test_times() -> None:
    """Hours, minutes and seconds, alone and together; nothing else is a time."""
    assert [seconds(text) for text in ("90s", "30m", "2h", "1h30m", "1H1M1S")] == [90, 1800, 7200, 5400, 3661]
    for text in ("", "h", "2", "-1h", "1h 30m x", "0s", "1.5h"):
        with pytest.raises(Zamba2Error, match="a time is needed"):
            seconds(text)


def test_ours_is_the_published_shape() -> None:
    """The series of ours are 2.7B's own shape, each format smaller than the one before."""
    found = [one for one in figures.all_series(Settings(formats=("bf16", "q8", "q4"), models=())) if one.engine == "zamba2"]
    assert {one.parameters for one in found} == {PRESETS["2.7b"].num_parameters}
    assert [one.bits for one in found] == [16, 4, 4] and found[0].weight_bytes > found[1].weight_bytes > found[2].weight_bytes
