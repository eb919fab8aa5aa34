// What all drawings share: canvases as sharp as the screen, colours of the style sheet, numbers for people.

/** A canvas's context in CSS pixels, cleared; null while it has no size. */
export function prepare(canvas) {
  const width = canvas.clientWidth;
  const height = canvas.clientHeight;
  if (!width || !height) return null;
  const ratio = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  return { context, width, height };
}

const NAMES = ["ink", "soft", "line", "card", "met", "risk", "missed", "none", "prefill", "decode", "accepted", "rejected"];

/** The colours of the present scheme, by the names they have in the style sheet. */
export function colours() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(NAMES.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

/** The smallest of 1, 2 and 5 times a power of ten that is not below `value`. */
export function nice(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999999);
}

/** Horizontal lines with their values, up to `top`. */
export function scale({ context, width, height }, palette, plot, top, format) {
  context.strokeStyle = palette.line;
  context.fillStyle = palette.soft;
  context.lineWidth = 1;
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const share of [0, 0.5, 1]) {
    const y = Math.round(plot.bottom - share * (plot.bottom - plot.top)) + 0.5;
    context.beginPath();
    context.moveTo(plot.left, y);
    context.lineTo(plot.right, y);
    context.stroke();
    context.fillText(format(share * top), plot.left - 6, y);
  }
}

/** Labels along the bottom, `seconds` wide, ending now. */
export function times({ context }, palette, plot, seconds) {
  context.fillStyle = palette.soft;
  context.textBaseline = "alphabetic";
  for (const share of [0, 0.5, 1]) {
    const ago = Math.round(seconds * (1 - share));
    context.textAlign = share === 0 ? "left" : share === 1 ? "right" : "center";
    const text = ago === 0 ? "now" : ago % 60 === 0 && ago >= 60 ? `${ago / 60} min ago` : `${ago} s ago`;
    context.fillText(text, plot.left + share * (plot.right - plot.left), plot.bottom + 15);
  }
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenth = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

export const number = (value) => (Math.abs(value) < 100 && value % 1 !== 0 ? tenth : whole).format(value);
export const percent = (share) => `${share > 0.99 && share < 1 ? tenth.format(share * 100) : whole.format(share * 100)} %`;

/** Milliseconds as a person writes them; a dash for none. */
export function duration(ms) {
  if (ms === null || ms === undefined) return "–";
  return ms >= 1000 ? `${tenth.format(ms / 1000)} s` : `${ms < 10 ? tenth.format(ms) : whole.format(ms)} ms`;
}
