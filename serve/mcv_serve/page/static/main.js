/** The page: what is pressed, what is asked for it, and what is shown of that. */

import { photographs } from "./camera.js";
import { Conversation } from "./conversation.js";
import { drawCut, show, takeIn } from "./picture.js";
import { answer, count, properties, Refusal, useKey } from "./server.js";
import { speak, tell } from "./texts.js";

const at = (id) => document.getElementById(id);
const EXAMPLE = {
  type: "object",
  properties: { text: { type: "string", maxLength: 200 }, language: { enum: ["en", "zh", "other"] } },
  required: ["text", "language"],
  additionalProperties: false,
};
let model = null;
let conversation = new Conversation();
let running = null; // the AbortController of the answer under way
let pricing = new AbortController();

async function begin() {
  try {
    model = await properties();
  } catch (error) {
    fail(error);
    return;
  }
  at("key-form").hidden = true;
  tell(at("key-error"), "");
  tell(at("failure"), "");
  at("model").textContent = model.model;
  at("slices").value = model.max_slice_nums;
  at("mode").length = 1;
  at("mode").append(...model.downsample_modes.map((mode) => new Option(mode, mode)));
  at("mode-label").hidden = !model.downsample_modes.length;
  await price();
}

function fail(error) {
  if (error.name === "AbortError") return;
  if (!(error instanceof Refusal)) console.error(error);
  if (error.status === 401) {
    tell(at("key-error"), at("key").value && "badKey");
    at("key-form").hidden = false;
    at("key").focus();
    return;
  }
  tell(at("failure"), error.status === 0 ? "lost" : "");
  if (error.status !== 0) at("failure").textContent = error.message;
}

function take(file) {
  const [size, most] = [file.size / 1e6, model?.limits.picture_mb];
  if (size > most) {
    tell(at("failure"), "tooLarge", { size, most });
    return;
  }
  anew(file);
  show(file);
  at("question").focus();
}

/** Begin a conversation, about another picture or the same. */
function anew(file) {
  running?.abort();
  conversation = new Conversation(file);
  at("turns").replaceChildren();
  for (const id of ["state", "failure"]) tell(at(id), "");
  price();
}

/** What of the choices a request says. */
function options() {
  const slices = at("slices").valueAsNumber;
  return {
    ...(conversation.file && slices >= 1 && { max_slice_nums: Math.floor(slices) }),
    ...(at("mode").value && { downsample_mode: at("mode").value }),
  };
}

/** Say what the picture and the conversation cost, and how the picture is cut. */
async function price() {
  pricing.abort();
  pricing = new AbortController();
  const [signal, question] = [pricing.signal, at("question").value.trim()];
  if (!model || !conversation.file) {
    tell(at("price"), "");
    return;
  }
  try {
    const counted = await count(await conversation.chat(question || "?", options()), signal);
    if (signal.aborted) return;
    drawCut(counted.pictures[0]);
    const context = model.default_generation_settings.n_ctx;
    const [visual, input] = [counted.image_tokens, counted.input_tokens];
    tell(at("price"), question ? "price" : "pricePicture", { visual, input, context });
  } catch (error) {
    if (signal.aborted) return;
    tell(at("price"), "");
    fail(error);
  }
}

/** The schema that the answer is held to, if one is wanted; null if it is none. */
function form() {
  tell(at("schema-error"), "");
  at("schema").removeAttribute("aria-invalid");
  if (!at("as-json").checked) return {};
  try {
    const schema = JSON.parse(at("schema").value);
    if (typeof schema !== "object" || !schema || Array.isArray(schema)) throw new Error("{}");
    return { response_format: { type: "json_schema", json_schema: { name: "answer", schema, strict: true } } };
  } catch (error) {
    tell(at("schema-error"), "badSchema", { why: error.message });
    at("schema").setAttribute("aria-invalid", "true");
    at("form-of-answer").open = true;
    at("schema").focus();
    return null;
  }
}

async function ask() {
  const [question, shape, about] = [at("question").value.trim(), form(), conversation];
  if (!question || !shape || running) return;
  const turn = addTurn(question);
  const stop = (running = new AbortController());
  const began = performance.now();
  let text = "";
  busy(true);
  at("question").value = "";
  tell(at("failure"), "");
  tell(at("state"), "reading");
  try {
    let last = {};
    for await (const chunk of answer(await about.chat(question, { ...options(), ...shape }), stop.signal)) {
      const [choice] = chunk.choices;
      if (choice?.delta.content) {
        if (!text) tell(at("state"), "answering");
        text += choice.delta.content;
        turn.write(choice.delta.content);
      }
      if (choice?.finish_reason) last = { ...chunk, why: choice.finish_details?.type ?? choice.finish_reason };
    }
    turn.finish(last.timings);
    const seconds = (performance.now() - began) / 1000;
    tell(at("state"), last.why === "stop" ? "done" : "cutShort", { seconds, why: last.why });
  } catch (error) {
    turn.finish();
    if (error.name === "AbortError") tell(at("state"), "stopped");
    else tell(at("state"), "");
    fail(error);
  }
  running = null;
  busy(false);
  if (text) {
    about.add(question, text);
  } else {
    turn.remove();
    at("question").value ||= question; // nothing typed is lost
  }
  if (about === conversation) price();
  else tell(at("state"), "");
}

function busy(now) {
  at("send").disabled = now;
  if (!now && document.activeElement === at("stop")) at("question").focus();
  at("stop").disabled = !now;
}

/** A question and its answer, which is announced when it is whole. */
function addTurn(question) {
  const [item, asked, answered, stats] = ["li", "h3", "p", "p"].map((kind) => document.createElement(kind));
  [asked.className, answered.className, stats.className] = ["asked", "answer", "stats"];
  asked.textContent = question;
  answered.setAttribute("aria-busy", "true");
  item.append(asked, answered, stats);
  at("turns").append(item);
  const follow = () => at("turns").scrollTo(0, at("turns").scrollHeight);
  follow();
  return {
    write(text) {
      answered.append(text);
      follow();
    },
    finish(timings) {
      answered.setAttribute("aria-busy", "false");
      if (!timings) return;
      tell(stats, "stats", {
        encode: timings.picture_encode_ms / 1000,
        read: timings.prompt_n,
        known: timings.cache_n,
        prefill: timings.prompt_ms / 1000,
        made: timings.predicted_n,
        decode: timings.predicted_ms / 1000,
        rate: timings.predicted_per_second,
      });
      follow();
    },
    remove: () => item.remove(),
  };
}

speak(at("language").value = navigator.language.startsWith("zh") ? "zh" : "en");
at("schema").value = JSON.stringify(EXAMPLE, null, 2);
at("language").addEventListener("change", () => speak(at("language").value));
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(at("key").value);
  begin();
});
at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
at("question").addEventListener("keydown", (event) => {
  // Enter that ends the choice of a Chinese word is not ours
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  at("ask").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
at("stop").addEventListener("click", () => running?.abort());
at("anew").addEventListener("click", () => {
  anew(conversation.file);
  at("question").focus();
});
for (const id of ["slices", "mode", "question"]) at(id).addEventListener("change", price);
takeIn(take, () => tell(at("failure"), "notOneFile"));
photographs(take, () => tell(at("failure"), "noCamera"));
begin();
