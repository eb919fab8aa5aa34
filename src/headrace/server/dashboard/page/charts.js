// Charts over the last minutes: stacked areas and lines, from rows that came once a second.

import { colours, nice, number, percent, prepare, scale, times } from "./draw.js";

const SPAN_S = 180;
const BREAK_S = 3;

const PURPOSES = ["prefill", "decode", "accepted", "rejected"];

function frame(area) {
  return { left: 44, right: area.width - 4, top: 8, bottom: area.height - 20 };
}

const horizontal = (plot, now) => (at) => plot.right - ((now - at) / SPAN_S) * (plot.right - plot.left);

function recent(rows, now) {
  return rows.filter((row) => row.at > now - SPAN_S - BREAK_S);
}

/** Tokens of an average step in each second, stacked by purpose. */
export function drawSteps(canvas, rows, now) {
  const area = prepare(canvas);
  if (!area) return;
  const { context } = area;
  const palette = colours();
  const plot = frame(area);
  const shown = recent(rows, now);
  const per = (row, purpose) => (row.steps ? row[purpose] / row.steps : 0);
  const sum = (row) => PURPOSES.reduce((total, purpose) => total + per(row, purpose), 0);
  const top = nice(Math.max(4, ...shown.map(sum)));
  const x = horizontal(plot, now);
  const y = (value) => plot.bottom - (value / top) * (plot.bottom - plot.top);
  scale(area, palette, plot, top, number);
  context.save();
  context.beginPath();
  context.rect(plot.left, 0, plot.right - plot.left, area.height);
  context.clip();
  for (const run of unbroken(shown)) {
    const below = run.map(() => 0);
    for (const purpose of PURPOSES) {
      const above = run.map((row, i) => below[i] + per(row, purpose));
      context.beginPath();
      run.forEach((row, i) => context.lineTo(x(row.at), y(above[i])));
      for (let i = run.length - 1; i >= 0; i--) context.lineTo(x(run[i].at), y(below[i]));
      context.closePath();
      context.fillStyle = palette[purpose];
      context.fill();
      above.forEach((value, i) => (below[i] = value));
    }
  }
  context.restore();
  times(area, palette, plot, SPAN_S);
}

/** Slots in use as an area, and those of cached prefixes on top of it. */
export function drawSlots(canvas, rows, now) {
  const shares = (row) => (row.slots ? [row.slots_used / row.slots, row.slots_cached / row.slots] : [0, 0]);
  lines(canvas, rows, now, [
    { value: (row) => shares(row)[0] + shares(row)[1], colour: "none", fill: 0.25 },
    { value: (row) => shares(row)[0], colour: "decode", fill: 0.35 },
  ]);
}

/** Share of draft nodes accepted; a gap where nothing was drafted. */
export function drawAcceptance(canvas, rows, now) {
  const share = (row) => (row.accepted + row.rejected > 0 ? row.accepted / (row.accepted + row.rejected) : null);
  lines(canvas, rows, now, [{ value: share, colour: "accepted", fill: 0.2 }]);
}

function lines(canvas, rows, now, series) {
  const area = prepare(canvas);
  if (!area) return;
  const { context } = area;
  const palette = colours();
  const plot = frame(area);
  const x = horizontal(plot, now);
  const y = (value) => plot.bottom - value * (plot.bottom - plot.top);
  scale(area, palette, plot, 1, percent);
  context.save();
  context.beginPath();
  context.rect(plot.left, 0, plot.right - plot.left, area.height);
  context.clip();
  for (const { value, colour, fill } of series) {
    for (const run of unbroken(recent(rows, now).filter((row) => value(row) !== null))) {
      context.beginPath();
      run.forEach((row) => context.lineTo(x(row.at), y(value(row))));
      context.strokeStyle = context.fillStyle = palette[colour];
      context.lineWidth = 2;
      context.lineJoin = "round";
      context.stroke();
      context.lineTo(x(run[run.length - 1].at), plot.bottom);
      context.lineTo(x(run[0].at), plot.bottom);
      context.globalAlpha = fill;
      context.fill();
      context.globalAlpha = 1;
    }
  }
  context.restore();
  times(area, palette, plot, SPAN_S);
}

/** Rows in runs without a gap: while nothing was measured nothing is drawn. */
export function unbroken(rows) {
  const runs = [];
  for (const row of rows) {
    const last = runs[runs.length - 1];
    if (last && row.at - last[last.length - 1].at <= BREAK_S) last.push(row);
    else runs.push([row]);
  }
  return runs;
}
