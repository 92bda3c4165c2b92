"""Clips and captions are found as people have them, and what has no partner is said."""

import json

import pytest

from fps_train.precompute.clips import find_clips


def files(folder, **content):
    for name, text in content.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def found(clips):
    return {clip.source: clip.caption for clip in clips}


def reasons(dropped):
    return {one.source: one.reason for one in dropped}


def test_a_folder_with_a_text_beside_each_clip(tmp_path):
    files(
        tmp_path, a_dot_mp4="", a_dot_txt="\ufeff 一只猫 \n", sub__b_dot_MOV="", sub__b_dot_txt="B\nand more", c_dot_png="",
        c_dot_txt="", d_dot_webm="", e_dot_txt="E", _dot_hidden_dot_mp4="", notes_dot_md="",
    )  # fmt: skip
    (tmp_path / "f.mp4").touch()
    (tmp_path / "f.txt").write_bytes(b"\xff\xfe\xfa")
    clips, dropped = find_clips(tmp_path)
    assert found(clips) == {"a.mp4": "一只猫", "sub/b.MOV": "B\nand more"}
    assert all(clip.path.is_absolute() for clip in clips)
    assert reasons(dropped) == {
        "c.png": "its caption is empty", "d.webm": "no caption", "e.txt": "a caption without a clip",
        "f.mp4": "its caption is no text",
    }  # fmt: skip


ROWS = [{"file_name": "x/a.mp4", "text": "A, with a comma"}, {"file_name": "b.png", "text": "B"}]
TABLES = {
    "metadata.csv": 'file_name,text,other\nx/a.mp4,"A, with a comma",1\nb.png,B,\n',
    "metadata.json": json.dumps(ROWS),
    "metadata.jsonl": "\n".join(map(json.dumps, ROWS)) + "\n\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_in_the_folder_or_elsewhere(tmp_path, name):
    files(tmp_path, x__a_dot_mp4="", b_dot_png="", c_dot_mp4="", c_dot_txt="not asked")
    (tmp_path / name).write_text(TABLES[name])
    want = {"x/a.mp4": "A, with a comma", "b.png": "B"}
    clips, dropped = find_clips(tmp_path)
    assert found(clips) == want
    assert reasons(dropped) == {"c.mp4": "no caption"}
    assert found(find_clips(None, tmp_path / name)[0]) == want  # paths relative to the table
    elsewhere = tmp_path.parent / f"of_{tmp_path.name}_{name}"
    elsewhere.write_text(TABLES[name])
    assert found(find_clips(tmp_path, elsewhere)[0]) == want  # or to the folder
    clips, dropped = find_clips(None, elsewhere)
    assert not clips
    assert reasons(dropped) == dict.fromkeys(want, "a caption without a clip")


@pytest.mark.parametrize("caption", ["caption", "text", "prompt"])
@pytest.mark.parametrize("path", ["video_path", "file_name", "video"])
@pytest.mark.parametrize("kind", ["csv", "json", "jsonl"])
def test_a_table_under_each_name_that_people_give_its_columns(tmp_path, kind, path, caption):
    files(tmp_path, sub__x__a_dot_mp4="", sub__b_dot_png="")
    rows = [{path: "x/a.mp4", caption: "A"}, {path: "b.png", caption: "B"}]
    write = {
        "csv": lambda: "".join(f"{a},{b}\n" for a, b in [(path, caption), *(row.values() for row in rows)]),
        "json": lambda: json.dumps(rows),
        "jsonl": lambda: "".join(json.dumps(row) + "\n" for row in rows),
    }
    table = tmp_path / "sub" / f"metadata.{kind}"
    table.write_text(write[kind]())
    for clips, dropped in (find_clips(tmp_path / "sub"), find_clips(None, table)):
        assert found(clips) == {"x/a.mp4": "A", "b.png": "B"}
        assert [clip.path for clip in clips] == [
            tmp_path / "sub" / clip.source for clip in clips
        ]  # relative to the table
        assert [clip.is_image for clip in clips] == [True, False]
        assert not dropped


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "file_name,words\na.mp4,A\n", "line 2: exactly one of caption, text, prompt must hold a text; it has file_name,"),
        ("t.csv", "file_name,video,text\na.mp4,b.mp4,A\n", "line 2: exactly one of video_path, file_name, video must hold"),
        ("t.csv", 'file_name,text\n"a.mp4,A\n', "can't be read as csv"),
        ("t.csv", "file_name,text\n", "names no clip; write a row for each"),
        ("t.jsonl", '{"video": "a.mp4", "prompt": "A"}\n{"video"', "can't be read as jsonl"),
        ("t.jsonl", '["a.mp4"]', "line 1: it must be an object"),
        ("t.json", '{"a.mp4": "A"}', "can't be read as json (it must be a list of objects)"),
        ("t.json", '[{"video": "a.mp4", "prompt": 3}]', "entry 1: exactly one of caption, text, prompt must hold a text"),
        ("t.json", "[" * 100_000, "can't be read as json"),
        ("t.xml", "", "must end in .csv, .json or .jsonl"),
    ],
)  # fmt: skip
def test_a_table_that_is_none(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as error:
        find_clips(None, tmp_path / name)
    assert message in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_folders_that_hold_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        find_clips(tmp_path / "none")
    with pytest.raises(ValueError, match=r"holds no clip \(.mp4"):
        find_clips(tmp_path / "empty")
    with pytest.raises(ValueError, match="both missing"):
        find_clips(None)
    with pytest.raises(FileNotFoundError, match="doesn't exist; it is a table"):
        find_clips(None, tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ValueError, match="is no regular file; it is a table"):
        find_clips(None, tmp_path / "folder.csv")
    files(tmp_path, metadata_dot_csv="", metadata_dot_json="")
    with pytest.raises(ValueError, match=r"holds metadata.csv and metadata.json; say which with --captions"):
        find_clips(tmp_path)
