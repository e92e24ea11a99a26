"""What benchmarks write says where it comes from, and can be read again; a plot's lines can be told apart."""

import json

from benchmarks.files import COLOURS, new_figure, read_csv, save_figure, write_results
from benchmarks.training.compare import COMPARISON


def test_rows_are_read_as_they_were_written_and_have_their_provenance_beside_them(tmp_path):
    target = tmp_path / "new folder" / "figures"
    write_results(target, [{"run": "a, b", "loss": 1.5}, {"run": "c", "loss": None}], {"folder": tmp_path})
    assert read_csv(target.with_suffix(".csv")) == [{"run": "a, b", "loss": "1.5"}, {"run": "c", "loss": ""}]
    facts = json.loads(target.with_suffix(".json").read_text())
    assert set(facts) == {"commit", "python", "torch", "triton", "deepspeed", "processor", "cores", "folder"}
    assert facts["folder"] == str(tmp_path)
    assert all(facts.values())


def test_as_many_lines_as_the_comparison_has_get_as_many_colours(tmp_path):
    figure, axes = new_figure(1, 2, inches=(4, 2))
    lines = [axis.plot([number])[0].get_color() for axis in axes for number in range(len(COMPARISON))]
    assert lines == [*COLOURS[: len(COMPARISON)]] * 2
    assert len(set(lines)) == len(COMPARISON)
    save_figure(figure, tmp_path / "lines.png")
    assert (tmp_path / "lines.png").stat().st_size > 1000
