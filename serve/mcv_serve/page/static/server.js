/** What the server is asked, and the key that it may want. */

let key = "";

export function useKey(given) {
  key = given;
}

/** The server says no, and why; status 0: it says nothing any more. */
export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function call(path, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const post = { method: "POST", body: JSON.stringify(body) };
  if (body) headers["Content-Type"] = "application/json";
  const response = await fetch(path, { ...(body && post), headers, signal, cache: "no-store" }).catch(lost);
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  throw new Refusal(response.status, told?.error?.message ?? `HTTP ${response.status}`);
}

function lost(error) {
  throw error.name === "AbortError" ? error : new Refusal(0, error.message);
}

/** What the model is and what it takes. */
export async function properties() {
  return (await call("props")).json();
}

/** Tokens of a chat, and how its pictures are cut. */
export async function count(chat, signal) {
  return (await call("v1/chat/completions/input_tokens", chat, signal)).json();
}

/** The chunks of an answer, as they come. */
export async function* answer(chat, signal) {
  const asked = { ...chat, stream: true, stream_options: { include_usage: true } };
  const response = await call("v1/chat/completions", asked, signal);
  for await (const chunk of events(response.body)) {
    if (chunk.error) throw new Refusal(response.status, chunk.error.message);
    yield chunk;
  }
}

/** The values of a stream of server-sent events, up to [DONE]; comments keep it alive. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch(lost);
    if (done) throw new Refusal(0, "the stream ended early");
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      if (!block.startsWith("data: ")) continue;
      const data = block.slice("data: ".length);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
