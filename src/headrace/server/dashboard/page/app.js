// Puts the page together: takes in data, keeps the last minutes, draws while somebody looks.

import { drawAcceptance, drawSlots, drawSteps } from "./charts.js";
import { number } from "./draw.js";
import { Feed, setKey } from "./feed.js";
import { say, showClasses, showRecent, showTiles } from "./tables.js";
import { Lanes, drawTimeline, inSight } from "./timeline.js";

const ROWS_KEPT = 300;
const REQUESTS_KEPT = 1000;
const FRAME_MS = 80;
const LONGEST_GUESS_S = 8;

const at = (id) => document.getElementById(id);
const still = matchMedia("(prefers-reduced-motion: reduce)");

const state = { data: null, received: 0, rows: [], requests: new Map(), lanes: new Lanes() };

/** Seconds on the server's clock, as far as known: it goes on between two answers, unless motion is unwanted. */
function now() {
  if (state.data === null) return 0;
  const since = document.body.dataset.state === "live" && !still.matches ? (performance.now() - state.received) / 1000 : 0;
  return state.data.now + Math.min(since, LONGEST_GUESS_S);
}

function become(name, text) {
  document.body.dataset.state = name;
  say("link", text);
}

function objects(columns, rows) {
  return rows.map((row) => Object.fromEntries(columns.map((column, i) => [column, row[i]])));
}

function take(data, fresh) {
  if (fresh) {
    state.rows = [];
    state.requests.clear();
    state.lanes = new Lanes();
  }
  const { columns } = data.requests;
  for (const [number, request] of state.requests) if (request.end === null) state.requests.delete(number);
  for (const request of objects(columns, data.requests.ended)) state.requests.set(request.number, request);
  for (const request of objects(columns, data.requests.open)) state.requests.set(request.number, request);
  for (const number of [...state.requests.keys()].sort((a, b) => a - b).slice(0, -REQUESTS_KEPT)) state.requests.delete(number);
  state.rows = [...state.rows, ...objects(data.steps.columns, data.steps.rows)].slice(-ROWS_KEPT);
  state.data = data;
  state.received = performance.now();
}

function show() {
  const { data } = state;
  document.title = data.model ? `${data.model} · headrace` : "headrace";
  say("model", data.model ? `serves ${data.model}` : { loading: "loads its model", failed: "has lost its engine" }[data.state] ?? data.state);
  at("main").hidden = false;
  at("key-form").hidden = true;
  at("banner").hidden = true;
  showTiles(data, state.rows);
  showClasses(data.classes);
  showRecent(state.requests);
  draw();
}

const visible = () => state.data !== null && !document.hidden && !at("main").hidden;

function drawBars() {
  if (!visible()) return;
  const moment = now();
  const hidden = drawTimeline(at("timeline"), state.requests, state.lanes, moment);
  describe(inSight(state.requests, moment), hidden);
}

/** The charts move a pixel in a second or so: they are drawn when there is news, to leave the machine to the model. */
function draw() {
  if (!visible()) return;
  drawBars();
  const moment = now();
  drawSteps(at("steps"), state.rows, moment);
  drawSlots(at("slots"), state.rows, moment);
  drawAcceptance(at("acceptance"), state.rows, moment);
}

/** What the timeline shows, in words. */
function describe(shown, undrawn) {
  const count = (standing) => shown.filter((request) => request.standing === standing).length;
  const words = `${number(shown.length)} requests: ${count("met")} on time or met, ${count("risk")} at risk, ${count("missed")} missed, ${count("none")} without a target`;
  if (at("timeline").getAttribute("aria-label") !== words) at("timeline").setAttribute("aria-label", words);
  at("timeline-empty").hidden = shown.length > 0 || state.data.ended > 0;
  const { queued, prefill, decode } = state.data.phases;
  const unsent = queued + prefill + decode - state.data.requests.open.length;
  const parts = [];
  if (!shown.length && state.data.ended) parts.push(`Quiet for a minute; ${number(state.data.ended)} answered so far.`);
  if (unsent > 0) parts.push(`${number(unsent)} more are open: the oldest are shown.`);
  if (undrawn > 0) parts.push(`${number(undrawn)} have no room here.`);
  say("timeline-note", parts.join(" "));
}

const feed = new Feed({
  data(data, fresh) {
    take(data, fresh);
    become("live", { ready: "live", draining: "live, shutting down", loading: "live, loading", failed: "live, engine lost" }[data.state]);
    show();
  },
  lost(seconds) {
    const again = `trying again ${seconds <= 1 ? "in a second" : `in ${seconds} s`}`;
    become("lost", `no connection, ${again}`);
    say("banner", `The server does not answer. What you see is as of ${new Date().toLocaleTimeString()}; ${again}.`);
    at("banner").hidden = false;
  },
  needsKey(wrong) {
    become("key", "waits for a key");
    setKey(null);
    at("main").hidden = true;
    at("banner").hidden = true;
    at("key-form").hidden = false;
    say("key-problem", wrong ? "The server does not know this key." : "");
    at("key").focus();
  },
});

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(at("key").value.trim());
  at("key").value = "";
  feed.start();
});

let drawn = 0;
function animate(time) {
  if (!still.matches && time - drawn >= FRAME_MS) {
    drawn = time;
    drawBars();
  }
  requestAnimationFrame(animate);
}

new ResizeObserver(draw).observe(document.body);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
document.addEventListener("visibilitychange", () => (document.hidden ? feed.stop() : feed.start()));
feed.start();
requestAnimationFrame(animate);
