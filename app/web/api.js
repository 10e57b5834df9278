// The service's public API over fetch: the key, errors in words, and server-sent events.

const KEY = "fluxd.key";

/** What the service answered instead; `param` names the field that is wrong, `body` is all
 *  that it said. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, param = null, retryS = null, body = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.param = param;
    this.retryS = retryS;
    this.body = body;
  }

  /** Nobody answered: the service is not running, or the way to it is broken. */
  get isUnreachable() {
    return this.status === 0;
  }

  get needsKey() {
    return this.status === 401;
  }

  /** The model is being loaded, or the service is ending and may come back. */
  get isPassing() {
    return this.status === 503 && (this.code === "loading" || this.code === "shutting_down");
  }
}

export function apiKey() {
  try {
    return localStorage.getItem(KEY);
  } catch {
    return null;
  }
}

export function keepApiKey(key) {
  try {
    if (key) localStorage.setItem(KEY, key);
    else localStorage.removeItem(KEY);
  } catch {
    throw new ApiError("this browser keeps nothing for this page, so it cannot keep the key");
  }
}

/** One request.
 *  @throws {ApiError} for any answer but a good one. */
export async function ask(path, { method = "GET", body, headers = {}, signal, key = apiKey() } = {}) {
  const sent = { ...headers };
  if (key) sent.Authorization = `Bearer ${key}`;
  if (body !== undefined) sent["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, {
      method,
      headers: sent,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("the service does not answer");
  }
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

export async function askJson(path, options) {
  return read(await ask(path, options), "json");
}

/** What an answer holds, as "json" or as a "blob".
 *  @throws {ApiError} when it ends in the middle, or is not the service's. */
export async function read(answer, kind) {
  try {
    return await answer[kind]();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("the service does not answer");
  }
}

/** The events of a stream, as {name, data}; ends when the stream does, whyever that is. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (text + value).split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const event = parsed(block);
        if (event) yield event;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsed(block) {
  const fields = { event: null, data: null };
  for (const line of block.split("\n")) {
    const at = line.indexOf(": ");
    if (at > 0) fields[line.slice(0, at)] = line.slice(at + 2);
  }
  return fields.event && { name: fields.event, data: JSON.parse(fields.data) };
}

async function refusal(answer) {
  let body = null;
  try {
    body = await answer.json();
  } catch {
    // A proxy's own page, not the service's answer.
  }
  const retry = Number(answer.headers.get("retry-after"));
  const error = body?.error;
  return new ApiError(error?.message ?? `the service answered with status ${answer.status}`, {
    status: answer.status,
    code: error?.code,
    param: error?.param,
    retryS: retry > 0 ? retry : null,
    body,
  });
}
