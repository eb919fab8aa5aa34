// Polls the server's data. The key, where one is needed, goes into a header and lives in this tab's session only.

const DATA = new URL("data", import.meta.url);
const KEY = "headrace-key";
const PERIOD_MS = 1000;
const LONGEST_PAUSE_MS = 10000;
const PATIENCE_MS = 8000;

/** Session storage may be switched off: then the key lives in memory alone. */
let remembered = null;

export function key() {
  try {
    return sessionStorage.getItem(KEY) ?? remembered;
  } catch {
    return remembered;
  }
}

export function setKey(value) {
  remembered = value;
  try {
    if (value === null) sessionStorage.removeItem(KEY);
    else sessionStorage.setItem(KEY, value);
  } catch {
    // in memory it is
  }
}

/** What is new since `revision`; "refused" without a good key; throws when there is no answer. */
async function fetchSince(revision) {
  const headers = key() === null ? {} : { authorization: `Bearer ${key()}` };
  const options = { headers, cache: "no-store", credentials: "omit", signal: AbortSignal.timeout(PATIENCE_MS) };
  const response = await fetch(`${DATA.href}?after=${revision}`, options);
  if (response.status === 401) return "refused";
  if (!response.ok) throw new Error(`the server answers ${response.status}`);
  return response.json();
}

/**
 * Calls `on.data(data, fresh)` with what is new (`fresh`: everything before it is void), `on.lost(seconds)` when the server does not
 * answer and will be asked again after so long, and `on.needsKey(wrong)`, after which it stops until `start` is called again.
 */
export class Feed {
  constructor(on) {
    this.on = on;
    this.revision = 0;
    this.epoch = null;
    this.failures = 0;
    this.timer = null;
    this.asking = false;
  }

  start() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.#ask(), 0);
  }

  stop() {
    clearTimeout(this.timer);
    this.timer = null;
  }

  async #ask() {
    if (this.asking) return;
    this.asking = true;
    const answer = await fetchSince(this.revision).catch(() => null);
    this.asking = false;
    if (answer === "refused") {
      this.stop();
      this.on.needsKey(key() !== null);
      return;
    }
    this.failures = answer === null ? this.failures + 1 : 0;
    const pause = Math.min(PERIOD_MS * 2 ** Math.max(this.failures - 1, 0), LONGEST_PAUSE_MS);
    if (this.timer !== null) this.timer = setTimeout(() => this.#ask(), pause);
    if (answer === null) this.on.lost(pause / 1000);
    else this.#take(answer);
  }

  #take(data) {
    if (this.epoch !== null && this.epoch !== data.epoch) {
      // Another run of the server: what it answered was asked for in the words of its predecessor. Ask again, for all.
      this.epoch = null;
      this.revision = 0;
      return;
    }
    const fresh = this.epoch === null;
    this.epoch = data.epoch;
    this.revision = data.revision;
    this.on.data(data, fresh);
  }
}
