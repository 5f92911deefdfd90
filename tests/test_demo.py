"""The demo: the whole job on real data, at the quality asked for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from fastlur.__main__ import main
from fastlur.demo import SCENARIOS, digits, play, scenario, table
from fastlur.evaluate import evaluate

SEEDS = (0, 1)


@pytest.fixture(scope="module")
def outcomes():
    return {(name, seed): play(name, seed, progress=False) for name in SCENARIOS for seed in SEEDS}


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_a_class_is_forgotten_and_the_others_are_kept(outcomes):
    runs = [outcomes["class", seed] for seed in SEEDS]
    assert mean(run.before.ua for run in runs) < 5
    assert mean(run.after.ua for run in runs) >= 99
    assert abs(mean(run.after.ta - run.retrained.ta for run in runs)) <= 1.5


def test_memorised_wrong_labels_are_forgotten(outcomes):
    runs = [outcomes["mislabelled", seed] for seed in SEEDS]
    assert mean(run.before.ua for run in runs) < 5  # they had been memorised
    assert mean(run.before.gap for run in runs) > 15
    assert mean(run.after.gap for run in runs) <= 3


def test_the_table_is_complete(outcomes):
    text = table([outcomes[name, 0] for name in SCENARIOS])
    for word in ("UA", "RA", "TA", "MIA", "gap", "seconds", "before", "after", "retrained", "times as fast"):
        assert word in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_scenarios_are_what_they_say():
    (images, labels), (test_images, _) = digits(0)
    assert images.shape == (1437, 1, 8, 8)
    assert test_images.shape == (360, 1, 8, 8)
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1
    one = scenario("class", 0)
    assert set(one.forget[1].tolist()) == {3}
    assert 3 not in set(one.retain[1].tolist()) | set(one.test[1].tolist())
    noisy = scenario("mislabelled", 0)
    assert len(noisy.forget[1]) == 71
    true = {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    assert all(true[i.numpy().tobytes()] != int(y) for i, y in zip(*noisy.forget, strict=True))
    assert all(true[i.numpy().tobytes()] == int(y) for i, y in zip(*noisy.retain, strict=True))


def test_the_verdict_is_taken_on_the_model_that_was_returned(outcomes):
    run = outcomes["class", 0]
    job = scenario("class", 0)
    again = evaluate(run.result.model, forget=job.forget, retain=job.retain, test=job.test, reference=run.retrained)
    assert again == run.after


def test_the_command_writes_table_figures_and_picture(outcomes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastlur.demo.play", lambda name, seed, progress: outcomes[name, seed])
    assert main(["demo", "--out", str(tmp_path), "--quiet"]) == 0
    assert "forget one class" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo.json", "demo.png", "table.txt"]
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "demo.json").read_text())
    assert record["scenarios"]["class"]["after"]["ua"] == outcomes["class", 0].after.ua


def test_info_prints_json():
    done = subprocess.run([sys.executable, "-m", "fastlur", "info"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["torch"] == torch.__version__
    assert {"grad_dot", "displace", "meta_update"} <= set(found["operations"])
