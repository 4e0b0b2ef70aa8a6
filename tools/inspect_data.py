#!/usr/bin/env python
"""Shows what is in a VOC tree: one HTML page to look through, and the same as JSON.

    python tools/inspect_data.py data/ich --output data/ich_inspection

In DIR: index.html with counts per split, patient and type, box sizes and the recall of clustered
anchors, contact sheets with the boxes drawn, and what is suspicious; inspection.json with the
numbers. Labels are those of labels.csv (image,label) or of slices.csv (image,hemorrhage) in ROOT.
"""

import argparse
import base64
import json
import sys
from pathlib import Path

import cv2
import jinja2
import numpy as np

from ich_det2.anchors.clustering import anchor_recall, cluster_anchors
from ich_det2.cli import guard, progress
from ich_det2.data.inspection import (
    box_sizes,
    counts,
    inspect_image,
    note_turned,
    read_grey,
)
from ich_det2.data.tree import VocTree
from ich_det2.files import write_atomically

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>{{ name }}</title><style>
body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:78em;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;text-align:right;
border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}
.scroll{overflow-x:auto}th,td{white-space:nowrap}
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(100px,1fr));gap:8px}
.odd{grid-template-columns:repeat(auto-fill,minmax(min(240px,46%),1fr))}
figure{margin:0;font-size:12px;color:#555;overflow-wrap:anywhere}
figure img{display:block;width:100%;height:auto}.odd b{color:#a00;font-weight:600}</style>
<h1>{{ name }}</h1>
<h2>Images</h2>{{ table(counts) }}
<p>{{ per_patient.patients }} patients with {{ per_patient.min }} to {{ per_patient.max }} images
each, {{ per_patient.median }} in the median.</p>
<h2>Boxes</h2>{{ table(boxes) }}
{% if anchors %}<p>Nine anchors clustered from all boxes, at a shorter side of {{ short_edge }}
pixels: sizes {{ anchors.sizes }}, height / width {{ anchors.ratios }}. Best possible recall
{{ anchors["recall 0.5"] }} at IoU 0.5, {{ anchors["recall 0.7"] }} at 0.7.</p>{% endif %}
<h2>To look at: {{ odd | length }}</h2>{{ table(kinds) }}
<div class="sheet odd">{% for item in odd %}<figure><img alt="" src="{{ item.picture }}">
{{ item.image }}<br>{% for text in item.findings %}<b>{{ text }}</b><br>{% endfor %}</figure>
{% endfor %}</div>
{% for split, pictures in sheets.items() %}<h2>{{ split }}</h2><div class="sheet">
{% for image, picture in pictures %}<figure><img alt="" loading="lazy" src="{{ picture }}">
{{ image }}</figure>{% endfor %}</div>{% endfor %}"""

TABLE = """<div class="scroll"><table>
<tr>{% for key in rows[0] %}<th>{{ key }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for v in row.values() %}<td>{{ v }}</td>{% endfor %}</tr>{% endfor %}
</table></div>"""


def main(argv=None) -> int:
    """Runs the command; returns the exit code, 2 for an error of the user."""
    args = parse_args(argv)
    return guard("inspect_data.py", lambda: inspect(args))


def parse_args(argv=None):
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, metavar="ROOT", help="VOC tree")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: ROOT_inspection")
    parser.add_argument("--short-edge", type=int, default=600, help="of the network's input, px")
    parser.add_argument("--sheet", type=int, default=120, help="images of each contact sheet")
    return parser.parse_args(argv)


def inspect(args) -> None:
    """Looks at every image and writes the page.

    Raises:
        FileNotFoundError, ValueError: one sentence that names a file.
    """
    root = args.root.resolve()
    output = args.output or root.with_name(f"{root.name}_inspection")
    tree = VocTree(root)
    files, patients, labels = tree.images, tree.patients, tree.slice_labels
    splits = {name: tree.read_list(name) for name in tree.lists if "fold" not in name}
    place = {image: split for split, ids in splits.items() for image in ids}
    shown = {i for ids in splits.values() for i in spread(ids, args.sheet)}
    shown |= set() if splits else set(spread(list(files), args.sheet))

    images, pictures = [], {}
    for image, path in progress(files.items(), "images"):
        grey, objects = read_grey(path), tree.annotation(image).objects
        found = inspect_image(image, grey, objects, labels.get(image))
        if image in shown:
            pictures[image] = draw(grey, objects, 110)
        images.append(found)
    by_id = {found.image: found for found in images}
    for ids, notes in tree.series():
        series = [by_id[i] for i in ids]
        series[0].findings += [f"series: {note}" for note in notes]
        note_turned(series)
    odd = [i for i in images if i.findings]

    wh = box_sizes(images, args.short_edge)
    report = {
        "name": root.name,
        "counts": counts(images, splits, patients, tree.findings),
        "per_patient": per_patient(files, patients),
        "boxes": summarize_boxes(wh),
        "short_edge": args.short_edge,
        "anchors": anchor_report(wh),
        "kinds": count_kinds(odd),
        "suspicious": [
            {"image": i.image, "split": place.get(i.image, ""), "findings": i.findings} for i in odd
        ],
    }
    output.mkdir(parents=True, exist_ok=True)
    with write_atomically(output / "inspection.json") as file:
        json.dump(report, file, indent=1, ensure_ascii=False)
    environment = jinja2.Environment(autoescape=True)
    table = environment.from_string(TABLE)
    page = environment.from_string(PAGE).render(
        **report,
        table=lambda rows: jinja2.filters.do_mark_safe(table.render(rows=rows)) if rows else "none",
        odd=[
            {
                "image": i.image,
                "findings": i.findings,
                "picture": draw(read_grey(files[i.image]), i.objects, 250),
            }
            for i in odd
        ],
        sheets={
            split: [(i, pictures[i]) for i in spread(ids, args.sheet)]
            for split, ids in (splits or {"all": list(files)}).items()
        },
    )
    with write_atomically(output / "index.html") as file:
        file.write(page)
    print(f"{len(images)} images, {len(odd)} to look at: {output / 'index.html'}")


def spread(ids: list[str], number: int) -> list[str]:
    """At most so many ids, evenly spaced over all."""
    return [
        ids[i] for i in np.unique(np.linspace(0, len(ids) - 1, min(number, len(ids))).astype(int))
    ]


def draw(grey: np.ndarray, objects, width: int) -> str:
    """A slice with its boxes as a data URL, at twice the width for sharp screens."""
    scale = 2 * width / grey.shape[1]
    size = (2 * width, max(1, round(grey.shape[0] * scale)))
    picture = cv2.cvtColor(cv2.resize(grey, size, interpolation=cv2.INTER_AREA), cv2.COLOR_GRAY2RGB)
    for obj in objects:
        x0, y0, x1, y1 = (int(round(v * scale)) for v in obj.box)
        cv2.rectangle(picture, (x0, y0), (x1, y1), (255, 90, 60), 2)
        cv2.putText(
            picture,
            obj.name,
            (x0, max(y0 - 4, 12)),
            cv2.FONT_HERSHEY_SIMPLEX,
            0.45,
            (255, 220, 0),
            1,
        )
    done, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def per_patient(files, patients) -> dict:
    """How many images the patients have."""
    numbers = np.unique([patients[i][0] for i in files if i in patients], return_counts=True)[1]
    if not len(numbers):
        return {"patients": "unknown", "min": "?", "max": "?", "median": "?"}
    median = float(np.median(numbers))
    return {
        "patients": len(numbers),
        "min": int(numbers.min()),
        "max": int(numbers.max()),
        "median": int(median) if median.is_integer() else median,
    }


def summarize_boxes(wh: np.ndarray) -> list[dict]:
    """Quantiles of the boxes at the network's input."""
    if not len(wh):
        return []
    values = {
        "width, px": wh[:, 0],
        "height, px": wh[:, 1],
        "sqrt(area), px": np.sqrt(wh.prod(axis=1)),
        "height / width": wh[:, 1] / wh[:, 0],
    }
    quantiles = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
    names = ("least", "5 %", "25 %", "median", "75 %", "95 %", "most")
    return [
        {"": key, **dict(zip(names, np.round(np.quantile(v, quantiles), 2).tolist()))}
        for key, v in values.items()
    ]


def anchor_report(wh: np.ndarray) -> dict:
    """Clustered anchors and their best possible recall."""
    if len(np.unique(wh, axis=0)) < 3:
        return {}
    anchors = cluster_anchors(wh, 3, 3)
    return {
        "sizes": [round(v, 1) for v in anchors.sizes],
        "ratios": [round(v, 2) for v in anchors.aspect_ratios],
        "recall 0.5": round(anchor_recall(wh, anchors, 0.5), 3),
        "recall 0.7": round(anchor_recall(wh, anchors, 0.7), 3),
    }


def count_kinds(odd) -> list[dict]:
    """How often each kind of finding occurs."""
    kinds = {
        "box over air": "lies over air",
        "tiny box": "tiny box",
        "large box": "of the image",
        "box, label normal": "label says no hemorrhage",
        "no box, label hemorrhage": "label says hemorrhage",
        "no head": "no head",
        "upside down": "upside down",
        "series": "series: ",
    }
    texts = [text for i in odd for text in i.findings]
    return [{"what": k, "findings": sum(part in t for t in texts)} for k, part in kinds.items()]


if __name__ == "__main__":
    sys.exit(main())
