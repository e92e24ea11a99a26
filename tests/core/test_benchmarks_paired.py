"""The pairing of two commits: its order, its arithmetic, and the checkout of the other one."""

import subprocess

import pytest

from benchmarks.links import paired
from benchmarks.links.pipeline import UNSHAPED
from clapping_ds import ClappingConfig


def answers(*steps_s, loss=2.0):
    return [{"step_s": step_s, "loss": loss} for step_s in steps_s]


def pairs_of(*times_s):
    return [paired.Pair(*pair, losses_equal=True) for pair in times_s]


def test_every_case_has_a_block_that_is_accepted():
    for block in paired.CASES.values():
        assert ClappingConfig.from_ds_config({"clapping": block}).enabled


def test_who_is_first_in_one_pair_is_second_in_the_next():
    turns = [version for number in range(4) for version in paired.order_turns(number)]
    assert turns == ["old", "new", "new", "old"] * 2


@pytest.mark.parametrize(("pairs", "shares"), [(2, [1, 1]), (4, [1, 1, 1, 1]), (10, [3, 3, 2, 2])])
def test_all_pairs_are_spread_over_the_launches(pairs, shares):
    assert paired.split_pairs(pairs) == shares


def test_a_step_lasts_as_long_as_its_slower_rank():
    assert paired.Pair.of(answers(1.0, 2.0), answers(4.0, 3.0)) == paired.Pair(2.0, 4.0, losses_equal=True)
    assert not paired.Pair.of(answers(1.0, 2.0), answers(1.0, 2.0, loss=2.1)).losses_equal


def test_the_ratio_is_of_pairs_so_that_a_slow_while_changes_nothing():
    row = paired.summarize_pairs(pairs_of((1.0, 1.1), (5.0, 5.5), (1.0, 1.1), (9.0, 9.9)))
    assert row["new/old"] == pytest.approx(1.1)
    assert row["error"] == pytest.approx(0.0)
    assert (row["pairs"], row["old_s"], row["new_s"]) == (4, 3.0, pytest.approx(3.3))


def test_the_error_follows_from_the_quartiles_and_the_number_of_pairs():
    row = paired.summarize_pairs(pairs_of((1.0, 1.0), (1.0, 1.2), (1.0, 1.4), (1.0, 1.6), (1.0, 1.8)))
    assert (row["quartile_1"], row["new/old"], row["quartile_3"]) == (1.2, 1.4, 1.6)
    assert row["error"] == pytest.approx(0.93 * 0.4 / 5**0.5)


def test_one_loss_that_differs_is_shown():
    pairs = [*pairs_of((1.0, 1.0), (1.0, 1.0)), paired.Pair(1.0, 1.0, losses_equal=False)]
    row = {"rho": UNSHAPED, "case": "direct eden4", **paired.summarize_pairs(pairs)}
    assert paired.show_row(row)["losses equal"] == "no"
    assert paired.show_row(row)["rho"] == "unshaped"


def test_the_other_commit_is_checked_out_and_removed(tmp_path, monkeypatch):
    def git(*arguments):
        name = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        command = ["git", "-C", str(tmp_path), *name, *arguments]
        return subprocess.check_output(command, text=True, stderr=subprocess.STDOUT)

    git("init")
    for content in ("old", "new"):
        (tmp_path / "file").write_text(content)
        git("add", "file")
        git("commit", "-m", content)
    monkeypatch.setattr(paired, "CHECKOUT", tmp_path)
    with paired.checked_out("HEAD~1") as tree:
        assert (tree / "file").read_text() == "old"
        assert (tmp_path / "file").read_text() == "new"
    assert not tree.exists()
    assert len(git("worktree", "list").splitlines()) == 1
    with pytest.raises(RuntimeError, match="nosuch"), paired.checked_out("nosuch"):
        pass
