"use strict";
// A study to look through: slices as pixel values, packed in the page itself.
const data = JSON.parse(document.getElementById("data").textContent);
const by = (id) => document.getElementById(id);
const image = by("image"), strip = by("strip"), slider = by("score");
const slices = data.slices, cache = new Map();
let at = data.first, [level, width] = data.window, boxes = true, drawn = 0;

// Differences along the rows, deflated, in base64.
async function unpack(i) {
  if (cache.has(i)) return cache.get(i);
  const s = slices[i];
  const bytes = Uint8Array.from(atob(s.pixels), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  const values = new Int16Array(await new Response(stream).arrayBuffer());
  for (let y = 0; y < s.rows; y++)
    for (let x = 1, k = y * s.columns + 1; x < s.columns; x++, k++) values[k] += values[k - 1];
  if (cache.size > 40) cache.delete(cache.keys().next().value);
  cache.set(i, values);
  return values;
}

function fit(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const w = Math.round(canvas.clientWidth * ratio), h = Math.round(canvas.clientHeight * ratio);
  if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
  return ratio;
}

const buffer = document.createElement("canvas");
async function draw() {
  const turn = ++drawn, s = slices[at], values = await unpack(at);
  if (turn !== drawn) return;
  const ratio = fit(image), paper = image.getContext("2d");
  if (buffer.width !== s.columns || buffer.height !== s.rows)
    [buffer.width, buffer.height] = [s.columns, s.rows];
  const pen = buffer.getContext("2d"), grey = pen.createImageData(s.columns, s.rows);
  const words = new Uint32Array(grey.data.buffer), low = level - width / 2, scale = 255 / width;
  for (let k = 0; k < values.length; k++) {
    const v = Math.max(0, Math.min(255, (values[k] - low) * scale)) | 0;
    words[k] = 0xff000000 | (v << 16) | (v << 8) | v;
  }
  pen.putImageData(grey, 0, 0);
  const zoom = Math.min(image.width / s.columns, image.height / (s.rows * s.ratio));
  const zx = zoom, zy = zoom * s.ratio;
  const left = (image.width - s.columns * zx) / 2, top = (image.height - s.rows * zy) / 2;
  paper.fillStyle = "#000";
  paper.fillRect(0, 0, image.width, image.height);
  paper.imageSmoothingQuality = "high";
  paper.drawImage(buffer, left, top, s.columns * zx, s.rows * zy);
  const least = Number(slider.value), shown = s.boxes.filter((b) => b.score >= least);
  if (boxes) {
    paper.font = `${13 * ratio}px system-ui, sans-serif`;
    for (const b of shown) {
      const [x0, y0, x1, y1] = b.box;
      paper.lineWidth = (b.score >= data.threshold ? 2 : 1) * ratio;
      paper.strokeStyle = paper.fillStyle = b.score >= data.threshold ? "#ffaa00" : "#a58448";
      paper.strokeRect(left + x0 * zx, top + y0 * zy, (x1 - x0) * zx, (y1 - y0) * zy);
      for (const points of b.outlines || []) {
        paper.beginPath();  // through the middles of the mask's outermost pixels
        for (let i = 0; i < points.length; i += 2)
          paper.lineTo(left + (points[i] + 0.5) * zx, top + (points[i + 1] + 0.5) * zy);
        paper.closePath();
        paper.stroke();
      }
      const name = data.classes > 1 ? `${b.class} ` : "";
      paper.fillText(name + b.score.toFixed(2), left + x0 * zx, top + y0 * zy - 4 * ratio);
    }
  }
  const unit = data.hu ? " HU" : "";
  by("text").textContent =
    `${s.series}  slice ${s.index}  (${at + 1} of ${slices.length})\n` +
    `score ${s.score.toFixed(3)}  ${s.verdict}\nwindow ${Math.round(level)} / ${Math.round(width)}${unit}` +
    (boxes ? "" : "\nboxes are hidden");
  by("least").textContent = least.toFixed(2);
  for (const b of document.querySelectorAll("button[data-level]"))
    b.setAttribute("aria-pressed", Number(b.dataset.level) === level && Number(b.dataset.width) === width);
  drawStrip();
  unpack((at + 1) % slices.length);
}

function drawStrip() {
  const ratio = fit(strip), paper = strip.getContext("2d"), w = strip.width / slices.length;
  const h = strip.height - 4 * ratio;
  paper.clearRect(0, 0, strip.width, strip.height);
  slices.forEach((s, i) => {
    const high = Math.max(s.score * h, ratio);
    paper.fillStyle = i === at ? "#46c8ff" : s.verdict === "positive" ? "#ffaa00" : "#5d666f";
    paper.fillRect(i * w, strip.height - high, Math.max(w - ratio, ratio), high);
    if (i && s.series !== slices[i - 1].series) {
      paper.fillStyle = "#9aa3ad";
      paper.fillRect(i * w - ratio, 0, ratio, strip.height);
    }
  });
  paper.fillStyle = "#e6e8ea";
  paper.fillRect(0, strip.height - data.threshold * h, strip.width, ratio / 2);
}

function go(i) { at = Math.max(0, Math.min(slices.length - 1, i)); draw(); }
function positive(step) {
  for (let i = at + step; i >= 0 && i < slices.length; i += step)
    if (slices[i].verdict === "positive") return go(i);
}
function setWindow(l, w) { [level, width] = [l, Math.max(w, 1)]; draw(); }

let turned = 0;
image.addEventListener("wheel", (e) => {
  e.preventDefault();
  turned += e.deltaMode ? Math.sign(e.deltaY) * 40 : e.deltaY;
  if (Math.abs(turned) >= 40) { go(at + Math.sign(turned)); turned = 0; }
}, { passive: false });
let hold = null;
image.addEventListener("pointerdown", (e) => {
  image.setPointerCapture(e.pointerId);
  hold = { x: e.clientX, y: e.clientY, at, level, width, touch: e.pointerType === "touch" };
});
image.addEventListener("pointermove", (e) => {
  if (!hold) return;
  const dx = e.clientX - hold.x, dy = e.clientY - hold.y;
  // A finger scrolls, a mouse changes the window.
  if (hold.touch) go(hold.at + Math.round(dy / 14));
  else setWindow(hold.level + dy * data.step, hold.width + dx * data.step);
});
for (const name of ["pointerup", "pointercancel"]) image.addEventListener(name, () => { hold = null; });
function pick(e) {
  if (e.type === "pointermove" && !e.buttons) return;
  const box = strip.getBoundingClientRect();
  go(Math.floor((e.clientX - box.left) / box.width * slices.length));
}
strip.addEventListener("pointerdown", pick);
strip.addEventListener("pointermove", pick);
slider.addEventListener("input", draw);
by("before").addEventListener("click", () => positive(-1));
by("after").addEventListener("click", () => positive(1));
const presets = [...document.querySelectorAll("button[data-level]")];
for (const b of presets)
  b.addEventListener("click", () => setWindow(Number(b.dataset.level), Number(b.dataset.width)));
addEventListener("keydown", (e) => {
  if (e.ctrlKey || e.metaKey || e.altKey || e.target === slider) return;
  const steps = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1, PageUp: -5, PageDown: 5 };
  if (e.key in steps) go(at + steps[e.key]);
  else if (e.key === "Home") go(0);
  else if (e.key === "End") go(slices.length - 1);
  else if (e.key === "n") positive(1);
  else if (e.key === "p") positive(-1);
  else if (e.key === "b") { boxes = !boxes; draw(); }
  else if (presets[Number(e.key) - 1]) presets[Number(e.key) - 1].click();
  else return;
  e.preventDefault();
});
addEventListener("resize", draw);
draw().catch((error) => { by("text").textContent = `The slices cannot be shown: ${error.message}`; });
