// Requests as bars: outlined while queued, pale in the prompt, full while decoding; the colour says how they stand.

import { colours, prepare, times } from "./draw.js";

const SPAN_S = 60;
const GAP_S = 0.3;
const THICKEST = 16;
const THINNEST = 2;

/** Keeps each request in a lane of its own for as long as it is in sight. */
export class Lanes {
  constructor() {
    this.ends = [];
    this.of = new Map();
  }

  /** The lane of `request`, the first in which it meets nobody. */
  place(request, now) {
    const end = (request.end ?? Infinity) + GAP_S;
    let lane = this.of.get(request.number);
    if (lane === undefined) {
      lane = this.ends.findIndex((taken) => taken <= request.arrival);
      if (lane < 0) lane = this.ends.length;
      this.of.set(request.number, lane);
      this.ends[lane] = end;
    } else if (request.end !== null && this.ends[lane] === Infinity) {
      this.ends[lane] = end;
    }
    return lane;
  }

  /** Forget who is out of sight, and lanes at the end that nobody needs. */
  keep(numbers) {
    for (const number of this.of.keys()) if (!numbers.has(number)) this.of.delete(number);
    const used = new Set(this.of.values());
    while (this.ends.length && !used.has(this.ends.length - 1)) this.ends.pop();
    for (let lane = 0; lane < this.ends.length; lane++) if (!used.has(lane)) this.ends[lane] = -Infinity;
  }
}

/** Requests in sight at `now`, the oldest first. */
export function inSight(requests, now) {
  return [...requests.values()]
    .filter((request) => request.end === null || request.end > now - SPAN_S)
    .sort((a, b) => a.number - b.number);
}

/** Draws the requests in sight and returns how many of them found no room. */
export function drawTimeline(canvas, requests, lanes, now) {
  const area = prepare(canvas);
  if (!area) return 0;
  const { context, width, height } = area;
  const palette = colours();
  const plot = { left: 0, right: width, top: 4, bottom: height - 20 };
  const shown = inSight(requests, now);
  lanes.keep(new Set(shown.map((request) => request.number)));
  const placed = shown.map((request) => [request, lanes.place(request, now)]);
  const count = Math.max(lanes.ends.length, 1);
  const pitch = Math.max(THINNEST, Math.min(THICKEST + 3, (plot.bottom - plot.top) / count));
  const thick = Math.max(1.5, Math.min(THICKEST, pitch * 0.82));
  const x = (at) => plot.right - ((now - at) / SPAN_S) * (plot.right - plot.left);
  grid(context, palette, plot);
  let hidden = 0;
  for (const [request, lane] of placed) {
    const y = plot.top + lane * pitch;
    if (y + thick > plot.bottom) hidden += 1;
    else bar(context, palette, request, x, y, thick, now);
  }
  times(area, palette, plot, SPAN_S);
  return hidden;
}

function grid(context, palette, plot) {
  context.strokeStyle = palette.line;
  context.lineWidth = 1;
  for (let part = 0; part <= 6; part++) {
    const at = Math.round(plot.left + (part / 6) * (plot.right - plot.left - 1)) + 0.5;
    context.beginPath();
    context.moveTo(at, plot.top);
    context.lineTo(at, plot.bottom);
    context.stroke();
  }
}

function bar(context, palette, request, x, y, thick, now) {
  const end = request.end ?? now;
  const begun = request.scheduled ?? request.first ?? end;
  const first = request.first ?? end;
  context.fillStyle = context.strokeStyle = palette[request.standing] ?? palette.none;
  const piece = (from, to, alpha) => {
    const left = Math.max(x(from), -4);
    const wide = x(to) - left;
    if (wide <= 0) return;
    context.globalAlpha = alpha;
    context.fillRect(left, y, Math.max(wide, 1), thick);
  };
  piece(request.arrival, begun, 0.14);
  if (thick >= 4 && x(begun) - x(request.arrival) > 2) {
    context.globalAlpha = 0.8;
    context.lineWidth = 1;
    context.strokeRect(Math.max(x(request.arrival), -4) + 0.5, y + 0.5, x(begun) - Math.max(x(request.arrival), -4) - 1, thick - 1);
  }
  piece(begun, first, 0.45);
  piece(first, end, 1);
  context.globalAlpha = 1;
  const size = thick * 0.26;
  if (request.standing === "missed" && thick >= 5 && x(end) - x(request.arrival) > 5 * size) {
    context.strokeStyle = palette.card;
    cross(context, x(end) - 2.2 * size, y + thick / 2, size);
  }
}

/** Colour alone must not tell: what missed has a cross at its end. */
function cross(context, x, y, size) {
  context.lineWidth = Math.max(1.5, size * 0.5);
  context.beginPath();
  context.moveTo(x - size, y - size);
  context.lineTo(x + size, y + size);
  context.moveTo(x + size, y - size);
  context.lineTo(x - size, y + size);
  context.stroke();
}
