"""VOC annotations: tolerant reading, strict writing, a round trip to six places."""

import math
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ich_det2.data.voc import read_voc, write_voc

REAL = Path(__file__).parents[2] / "../shared/data/ct_ich"
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def annotation(*boxes, size=(512, 512), name="SDH"):
    """XML of objects given as the texts (xmin, ymin, xmax, ymax)."""
    xml = "<annotation><filename>a.dcm</filename>"
    if size:
        xml += "<size><width>{}</width><height>{}</height></size>".format(*size)
    for box in boxes:
        xml += f"<object><name>{name}</name><bndbox>"
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
            xml += f"<{tag}>{value}</{tag}>"
        xml += "</bndbox></object>"
    return xml + "</annotation>"


@pytest.fixture
def read(tmp_path):
    def parse(content):
        path = tmp_path / "some.xml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_voc(path)

    return parse


def boxes_of(result):
    return [obj.box for obj in result.objects]


def test_one_based_inclusive_corners_become_edges(read):
    # Pixels 1..1 are one pixel, the edges 0 and 1; pixels 11..20 are ten, the edges 10 and 20.
    assert boxes_of(read(annotation((1, 1, 1, 1), (11, 5, 20, 5)))) == [
        (0.0, 0.0, 1.0, 1.0),
        (10.0, 4.0, 20.0, 5.0),
    ]


def test_healthy_slice_has_no_objects(read, tmp_path):
    result = read(annotation())
    assert (result.objects, result.width, result.height) == ((), 512, 512)
    assert result.path == tmp_path / "some.xml"


def test_only_boxes_are_needed(read):
    result = read(annotation((3, 4, 5, 6), size=None).replace("<filename>a.dcm</filename>", ""))
    assert (result.filename, result.width, result.height) == (None, None, None)
    assert result.objects[0].name == "SDH"
    assert result.objects[0].difficult is False
    assert boxes_of(result) == [(2.0, 3.0, 5.0, 6.0)]


def test_float_scientific_and_padded_numbers(read):
    result = read(annotation((" 1.5 ", "\n2e1\n", "1E2", "30.25"), size=("512.0", " 512 ")))
    assert boxes_of(result) == [(0.5, 19.0, 100.0, 30.25)]
    assert result.width == 512


def test_extra_elements_attributes_and_parts_are_ignored(read):
    xml = annotation((3, 4, 5, 6)).replace("<object>", "<object id='1'><part><bndbox/></part>", 1)
    xml = xml.replace("</object>", "<difficult> 1 </difficult><pose>x</pose></object>")
    result = read(xml)
    assert boxes_of(result) == [(2.0, 3.0, 5.0, 6.0)]
    assert result.objects[0].difficult is True


def test_byte_order_marks_and_namespaces(read):
    xml = annotation((3, 4, 5, 6))
    expected = [(2.0, 3.0, 5.0, 6.0)]
    assert boxes_of(read(b"\xef\xbb\xbf" + xml.encode())) == expected
    assert boxes_of(read(xml.encode("utf-16"))) == expected
    assert boxes_of(read(xml.replace("<annotation>", "<annotation xmlns='urn:x'>"))) == expected


def test_boxes_are_clipped_to_the_image(read):
    # LabelImg and CVAT write 0 or more than the size at a border.
    assert boxes_of(read(annotation((0, -5, 600, 513)))) == [(0.0, 0.0, 512.0, 512.0)]
    assert boxes_of(read(annotation((0, 1, 600, 513), size=None))) == [(0.0, 0.0, 600.0, 513.0)]


@pytest.mark.parametrize(
    "written, name",
    [
        ("a.dcm", "a.dcm"),
        ("/etc/passwd", "passwd"),
        ("../../b.png", "b.png"),
        ("C:\\scans\\c.jpg", "c.jpg"),
        ("  d.jpg ", "d.jpg"),
        ("..", None),
        ("folder/", None),
        ("", None),
    ],
)
def test_filename_is_never_a_path(read, written, name):
    assert read(annotation().replace("a.dcm", written)).filename == name


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is not XML"),
        ("not xml", "is not XML"),
        (b"\xff\xd8\xff\xe0JFIF", "is not XML"),
        ("<annotation>", "is not XML"),
        ("<?xml version='1.0' encoding='klingon'?><annotation/>", "is not XML"),
        ("<annotations><image/></annotations>", "root element is <annotations>"),
        (annotation((1, 1, 2, 2), (5, 1, 4, 2)), "object 1: xmax 4 is less than xmin 5"),
        (annotation((1, 9, 2, 2)), "object 0: ymax 2 is less than ymin 9"),
        (annotation((600, 1, 700, 2)), "object 0: xmin 600 to xmax 700 has no pixel inside"),
        (annotation((-9, 1, 0, 2)), "has no pixel inside"),
        (annotation(("nan", 1, 2, 2)), "object 0: xmin is 'nan', expected a finite number"),
        (annotation((1, 1, 2, "inf")), "object 0: ymax is 'inf'"),
        (annotation((1, 1, "1e999", 2)), "object 0: xmax is '1e999'"),
        (annotation(("", 1, 2, 2)), "object 0: xmin is missing"),
        (annotation((1, "one", 2, 2)), "object 0: ymin is 'one'"),
        (annotation((1, 1, 2, 2)).replace("xmin", "left"), "xmin is missing"),
        (annotation((1, 1, 2, 2)).replace("bndbox", "polygon"), "object 0 has no <bndbox>"),
        (annotation((1, 1, 2, 2), name=" "), "object 0 has no <name>"),
        (annotation(size=(0, 0)), "size/width is '0'"),
        (annotation(size=(512, -3)), "size/height is '-3'"),
        (annotation(size=(512, "5.5")), "size/height is '5.5'"),
        (annotation(size=("wide", 512)), "size/width is 'wide'"),
    ],
)
def test_refusals_name_file_and_fault(read, content, message):
    with pytest.raises(ValueError, match=r"some\.xml") as error:
        read(content)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "entity",
    ['<!ENTITY a "1"><!ENTITY b "&a;&a;">', '<!ENTITY b SYSTEM "file:///etc/passwd">'],
    ids=["bomb", "external"],
)
def test_entities_are_refused(read, entity):
    xml = f"<!DOCTYPE annotation [{entity}]><annotation><filename>&b;</filename></annotation>"
    with pytest.raises(ValueError, match=r"some\.xml: defines XML entities"):
        read(xml)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.xml: no such annotation file"):
        read_voc(tmp_path / "none.xml")
    with pytest.raises(ValueError, match="cannot be read"):
        read_voc(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        write_voc(tmp_path / "no" / "a.xml", filename="a.dcm", width=5, height=5, objects=[])


def test_written_file_is_what_labelimg_writes(tmp_path):
    path = tmp_path / "a.xml"
    objects = [("EDH & <x>", (0, 0.5, 10, 20.0))]
    write_voc(path, filename="in/a.dcm", width=64, height=32, objects=objects, database="D")
    text = "".join(line.strip() for line in path.read_text().splitlines())
    assert text == (
        "<annotation><folder>DICOM</folder><filename>a.dcm</filename>"
        "<source><database>D</database></source>"
        "<size><width>64</width><height>32</height><depth>1</depth></size>"
        "<segmented>0</segmented><object><name>EDH &amp; &lt;x&gt;</name>"
        "<pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>"
        "<bndbox><xmin>1</xmin><ymin>1.5</ymin><xmax>10</xmax><ymax>20</ymax></bndbox>"
        "</object></annotation>"
    )
    assert os.listdir(tmp_path) == ["a.xml"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"width": 0}, "image size is 0 x 10"),
        ({"height": math.nan}, "image size is 10 x nan"),
        ({"filename": "x/.."}, "filename"),
        ({"objects": [("", (0, 0, 1, 1))]}, "object 0: the name"),
        ({"objects": [("a\x00b", (0, 0, 1, 1))]}, "object 0: the name"),
        ({"objects": [("a", (0, 0, 11, 1))]}, "object 0: x runs from 0 to 11"),
        ({"objects": [("a", (0, 3, 1, 3))]}, "object 0: y runs from 3 to 3"),
        ({"objects": [("a", (0, 3.1, 1, 3.9))]}, "at least one pixel"),
        ({"objects": [("a", (math.nan, 0, 1, 1))]}, "object 0: x runs from nan"),
    ],
)
def test_writer_refuses_what_cannot_be_read_back(tmp_path, change, message):
    path = tmp_path / "a.xml"
    path.write_text("before")
    arguments = {"filename": "a.dcm", "width": 10, "height": 10, "objects": []} | change
    with pytest.raises(ValueError, match=r"a\.xml") as error:
        write_voc(path, **arguments)
    assert message in str(error.value)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.xml", "before")]


def spans(limit):
    edge = st.floats(0, limit - 1) | st.integers(0, limit - 1)
    return edge.flatmap(
        lambda low: st.tuples(st.just(low), st.floats(low + 1, limit) | st.just(limit))
    )


@quick
@given(
    objects=st.lists(
        st.tuples(
            st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=8),
            st.tuples(spans(512), spans(300)).map(
                lambda xy: (xy[0][0], xy[1][0], xy[0][1], xy[1][1])
            ),
        ),
        max_size=2,
    )
)
def test_round_trip_keeps_six_places(tmp_path, objects):
    path = tmp_path / "trip.xml"
    write_voc(path, filename="a.png", width=512, height=300, objects=objects)
    result = read_voc(path)
    assert [obj.name for obj in result.objects] == [name for name, _ in objects]
    for obj, (_, box) in zip(result.objects, objects, strict=True):
        assert obj.box == pytest.approx(box, rel=0, abs=1e-6)
    assert (result.filename, result.width, result.height) == ("a.png", 512, 300)


def check_parsed_or_refused(path, content):
    path.write_bytes(content)
    try:
        result = read_voc(path)
    except ValueError as error:
        assert path.name in str(error)
        return
    for x0, y0, x1, y1 in boxes_of(result):
        assert 0 <= x0 < x1 <= (result.width or math.inf)
        assert 0 <= y0 < y1 <= (result.height or math.inf)
        assert math.isfinite(x1 + y1)


numbers = (
    st.integers(-10, 600)
    | st.floats()
    | st.sampled_from(["", " 7 ", "1_0", "１２", "1e-999999999", "9" * 400, "0x1", "--1", "1e17"])
)


@quick
@given(
    box=st.tuples(numbers, numbers, numbers, numbers),
    size=st.none() | st.tuples(numbers, numbers),
)
def test_any_coordinates_are_parsed_or_refused(tmp_path, box, size):
    check_parsed_or_refused(tmp_path / "numbers.xml", annotation(box, size=size).encode())


tags = st.sampled_from(["annotation", "object", "bndbox", "size", "xmin", "ymax", "name", "width"])
trees = st.recursive(
    st.text(max_size=5).map(str) | numbers.map(str),
    lambda inner: st.tuples(tags, st.lists(inner, max_size=4)).map(
        lambda t: f"<{t[0]}>{''.join(t[1])}</{t[0]}>"
    ),
    max_leaves=12,
)


@quick
@given(content=st.binary(max_size=60) | trees.map(lambda t: t.encode("utf-8", "replace")))
def test_any_bytes_are_parsed_or_refused(tmp_path, content):
    check_parsed_or_refused(tmp_path / "garbage.xml", content)
    check_parsed_or_refused(tmp_path / "garbage.xml", b"<annotation>" + content + b"</annotation>")


@quick
@given(start=st.integers(0, 200), stop=st.integers(0, 200))
def test_any_cut_is_parsed_or_refused(tmp_path, start, stop):
    whole = annotation((1, 2, 30, 40)).encode()
    check_parsed_or_refused(tmp_path / "cut.xml", whole[:start] + whole[stop:])


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")
def test_real_tree():
    annotations = [read_voc(path) for path in sorted((REAL / "Annotations").glob("*.xml"))]
    assert len(annotations) == 335
    assert sum(bool(a.objects) for a in annotations) == 155
    assert all(a.filename == a.path.stem + ".jpg" for a in annotations)
