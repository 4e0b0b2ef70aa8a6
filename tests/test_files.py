"""Files appear whole or not at all; the walk leaves out what nobody put there."""

import os

import pytest

from ich_det2.files import nested, replace_folder, walk, write_atomically


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


def test_a_folder_is_replaced_whole(tmp_path):
    for content in ("old", "new"):
        with replace_folder(tmp_path / "sub" / "a") as folder:
            (folder / content).mkdir()
    assert [p.name for p in (tmp_path / "sub").rglob("*")] == ["a", "new"]


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("step", ["while it is written", "when it takes its place"])
def test_a_folder_that_fails_leaves_what_was_there(tmp_path, monkeypatch, before, step):
    if before:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / before).touch()
    rename = os.rename

    def failing(source, target):
        if os.path.basename(source) == "new":
            raise KeyboardInterrupt(step)
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(KeyboardInterrupt, match=step), replace_folder(tmp_path / "a") as folder:
        (folder / "half").touch()
        if step.startswith("while"):
            raise KeyboardInterrupt(step)
    assert [p.name for p in tmp_path.rglob("*")] == (["a", "old"] if before else [])


def test_walk_is_sorted_and_leaves_out_what_systems_hide(tmp_path):
    root = tmp_path / ".hidden"  # what a user names is looked into
    visible = ["IM10", "IM2.DCM", "a b/ü.png", "sub/IM1"]
    hidden = "._IM2.DCM .DS_Store Thumbs.db desktop.ini __MACOSX/IM2.DCM sub/.git/x .x/y @eaDir/z"
    for name in (*visible, *hidden.split()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    unread = []
    assert [p.relative_to(root).as_posix() for p in walk(root, unread)] == visible
    assert unread == []


def test_walk_stays_in_its_folder(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir(), outside.mkdir()
    (outside / "a").touch(), (root / "b").touch()
    (root / "inner").symlink_to(root / "b")
    (root / "file").symlink_to(outside / "a")
    (root / "folder").symlink_to(outside)
    (root / "loop").symlink_to(root)
    (root / "broken").symlink_to(root / "nothing")
    unread = []
    assert walk(root, unread) == [root / "b", root / "inner"]
    assert [(path.name, "link" in reason) for path, reason in unread] == [
        ("broken", False), ("file", True), ("folder", True), ("loop", True),
    ]  # fmt: skip
    (tmp_path / "link").symlink_to(root)
    assert walk(tmp_path / "link")[0] == tmp_path / "link" / "b"
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        walk(root / "b")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        walk(root / "none")


def test_folders_that_lie_in_one_another(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    a, b, c = tmp_path / "a", tmp_path / "a/b", tmp_path / "c"
    assert nested(a, [c, b]) == b and nested(b, [c, a]) == a and nested(a, [a]) == a
    assert nested(a, [c, tmp_path / "ab"]) is None and nested(c, []) is None
    assert nested(tmp_path / "link/b", [a]) == a
    # Beside a file, but not in it; in a folder that is not there yet.
    assert nested(a, [a / "file"]) == a / "file" and nested(a / "file" / "x", [a / "file"]) is None
    assert nested(c / "new", [c]) == c
