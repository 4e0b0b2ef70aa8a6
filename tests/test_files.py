"""Files appear whole or not at all."""

import pytest

from ich_det2.files import write_atomically


def test_text_is_utf8_with_newlines_as_written(tmp_path):
    path = tmp_path / "a.csv"
    with write_atomically(path) as file:
        file.write("Blutung ä\nb\r\n")
    assert path.read_bytes() == "Blutung ä\nb\r\n".encode()


def test_bytes_replace_an_older_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old and longer")
    with write_atomically(str(path), "wb") as file:
        file.write(b"new")
        assert path.read_bytes() == b"old and longer"  # still whole while being written
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("before", [None, "old"])
def test_failure_leaves_what_was_there_and_no_temporary(tmp_path, before):
    path = tmp_path / "a.txt"
    if before:
        path.write_text(before)
    with pytest.raises(RuntimeError, match="half way"), write_atomically(path) as file:
        file.write("half")
        raise RuntimeError("half way")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == (
        {"a.txt": "old"} if before else {}
    )


def test_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), write_atomically(tmp_path / "no" / "a.txt"):
        pass
    assert not (tmp_path / "no").exists()
