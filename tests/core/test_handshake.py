"""What has the block, or its file."""

import json

import pytest

from clapping_ds.stage.handshake import read_source

BLOCK = {"clapping": {"strategy": "direct"}}


def test_a_mapping_is_taken_and_a_file_read(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(BLOCK))
    assert read_source(BLOCK) == read_source(path) == read_source(str(path)) == BLOCK


def test_what_is_no_json_object_is_refused(tmp_path):
    path = tmp_path / "ds.json"
    for text, message in (("{", "ds.json is no JSON"), ("[]", 'is no JSON object; accepted: {"clapping"')):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_source(path)
    with pytest.raises(FileNotFoundError):
        read_source(tmp_path / "none.json")
