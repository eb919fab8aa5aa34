// The page's words and numbers. Text goes in as text, never as markup.

import { duration, number, percent } from "./draw.js";

const LATEST = 12;
const RATE_S = 10;
const WORDS = { met: "met", risk: "at risk", missed: "missed", none: "none" };
const OPEN_WORDS = { ...WORDS, met: "on time" };

const at = (id) => document.getElementById(id);

export function say(id, text) {
  const element = at(id);
  if (element.textContent !== text) element.textContent = text;
}

function cell(content) {
  const made = document.createElement("td");
  made.append(content);
  return made;
}

function badge(standing, open) {
  const made = document.createElement("span");
  made.className = `badge ${standing}`;
  made.textContent = (open ? OPEN_WORDS : WORDS)[standing] ?? standing;
  return made;
}

/** The tiles above everything. */
export function showTiles(data, rows) {
  const { queued, prefill, decode } = data.phases;
  say("open", number(queued + prefill + decode));
  say("phases", `${number(queued)} queued, ${number(prefill)} prefill, ${number(decode)} decode`);
  const judged = data.classes.reduce((sum, one) => sum + one.judged, 0);
  const met = data.classes.reduce((sum, one) => sum + one.met, 0);
  say("attained", judged ? percent(met / judged) : "–");
  say("attained-note", judged ? `${number(met)} of the latest ${number(judged)}` : "no request with a target yet");
  showEngine(data, rows);
}

function showEngine(data, rows) {
  const recent = rows.filter((row) => row.at > data.now - RATE_S);
  const total = (name) => recent.reduce((sum, row) => sum + row[name], 0);
  const seconds = recent.length;
  say("rate", seconds ? number((total("decode") + total("accepted")) / seconds) : "–");
  const steps = total("steps");
  say("rate-note", steps ? `${number(steps / seconds)} steps of ${duration((total("busy_s") / steps) * 1000)}` : "no step in 10 s");
  const drafted = total("accepted") + total("rejected");
  say("accepted", drafted ? percent(total("accepted") / drafted) : "–");
  say("accepted-note", drafted ? `${number(drafted / seconds)} drafted a second` : "nothing drafted in 10 s");
  const last = rows[rows.length - 1];
  say("kv", last?.slots ? percent(last.slots_used / last.slots) : "–");
  say("kv-note", last?.slots ? `${number(last.slots_used)} of ${number(last.slots)} tokens` : "");
  say("slots-note", last?.slots ? `In use ${number(last.slots_used)}, kept for shared beginnings ${number(last.slots_cached)}.` : "");
  say("steps-note", `Average step in each second. A step may hold ${number(data.step_limit)} tokens.`);
  say("acceptance-note", drafted ? "" : "Nothing is being drafted now.");
}

/** A row per service class. */
export function showClasses(classes) {
  at("classes-empty").hidden = classes.length > 0;
  at("classes").replaceChildren(...classes.map(classRow));
}

function classRow(one) {
  const row = document.createElement("tr");
  const open = Object.values(one.open).reduce((sum, count) => sum + count, 0);
  const share = document.createElement("span");
  if (one.judged) {
    const bar = document.createElement("span");
    const part = document.createElement("i");
    bar.className = "bar";
    part.style.width = `${(100 * one.met) / one.judged}%`;
    bar.append(part);
    share.append(bar, `${percent(one.met / one.judged)} (${number(one.met)} of ${number(one.judged)})`);
  } else {
    share.append("–");
  }
  const risky = one.open.risk + one.open.missed;
  row.append(cell(one.name), cell(duration(one.ttft_ms)), cell(duration(one.tpot_ms)), cell(share), cell(number(open)), cell(number(risky)));
  return row;
}

/** The latest requests, which is also the timeline for those who do not see it. */
export function showRecent(requests) {
  const latest = [...requests.values()].sort((a, b) => b.number - a.number).slice(0, LATEST);
  at("recent").replaceChildren(...latest.map(requestRow));
}

function requestRow(request) {
  const row = document.createElement("tr");
  const open = request.end === null;
  row.append(
    cell(number(request.number)), cell(request.class), cell(request.phase), cell(badge(request.standing, open)),
    cell(duration(request.ttft_ms)), cell(duration(request.tpot_ms)), cell(number(request.prompt)), cell(number(request.tokens)),
  );
  return row;
}
