// What chat and comparison share: the API, streams, answers with their score and log-ratios.

import { markdown } from "./markdown.js";

export const $ = (id) => document.getElementById(id);
export const state = { reward: false, models: [] };

export function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

export function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

export async function api(path, body, signal) {
  const key = sessionStorage.getItem("key");
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const options = { headers, signal };
  if (body !== undefined) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    headers["content-type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  if (response.status === 401) $("key-form").hidden = false;
  const told = await response.json().catch(() => null);
  throw new Error(told?.error?.message ?? `The server answered ${response.status}.`);
}

// Calls `onText` with every new piece of an answer.
export async function streamChat(model, messages, onText, signal) {
  const response = await api("v1/chat/completions", { ...request(model, messages), stream: true },
    signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      const piece = chunk.choices[0]?.delta.content;
      if (piece) onText(piece);
    }
  }
}

function request(model, messages) {
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  return {
    model,
    messages,
    temperature: number("temperature"),
    top_p: number("top-p"),
    max_tokens: number("max-tokens"),
    seed: number("seed"),
  };
}

export function withSystem(turns) {
  const system = $("system").value.trim();
  return system ? [{ role: "system", content: system }, ...turns] : turns;
}

// An answer that fills up, with buttons for score and log-ratios once it is there.
export function answerView(place) {
  const text = element("div", "text rendered");
  place.replaceChildren(text);
  let frame = 0;
  const render = () => {
    frame = 0;
    text.replaceChildren(markdown(content));
  };
  place.setAttribute("aria-busy", "true");
  let content = "";
  return {
    add(piece) {
      content += piece;
      frame ||= requestAnimationFrame(render);
    },
    get content() {
      return content;
    },
    finish() {
      cancelAnimationFrame(frame);
      render();
      place.setAttribute("aria-busy", "false");
      if (!content.trim()) text.append(element("span", "note", "(an empty answer)"));
    },
    // Buttons that tell who answered: not before the vote where that is hidden.
    addTools(model, messages) {
      if (content.trim()) place.append(tools(text, model, [...messages, answered(content)]));
    },
  };
}

const answered = (content) => ({ role: "assistant", content });

function tools(text, model, messages) {
  const row = element("div", "tools");
  const score = element("span", "note");
  const ratios = element("span", "note");
  for (const told of [score, ratios]) told.setAttribute("role", "status");
  if (state.reward) {
    row.append(button("Reward score", async () => {
      const found = await (await api("v1/score", { messages })).json();
      score.textContent = `score ${found.data[0].score.toFixed(3)}`;
    }));
  }
  row.append(button("Log-ratios", async () => {
    const reference = $("reference").value;
    const found = await (await api("v1/token_kl", { model, reference, messages })).json();
    text.classList.remove("rendered");
    shade(text, found.tokens);
    ratios.textContent = `log-ratio to ${reference}: ${found.kl.toFixed(2)} nats over ` +
      `${found.tokens.length} tokens (red: likelier than there; blue, dotted: less likely)`;
  }));
  row.append(score, ratios);
  return row;
}

function button(label, work) {
  const made = element("button", "", label);
  made.type = "button";
  made.addEventListener("click", async () => {
    made.disabled = true;
    try {
      await work();
    } catch (error) {
      say(error.message, true);
    }
    made.disabled = false;
  });
  return made;
}

// Tokens that make whole characters, as one: those of a byte-level vocabulary may hold parts of
// one. A line's end is shown as such, so that its colour is seen.
export function readable(tokens) {
  const decoder = new TextDecoder();
  const groups = [];
  let open = [];
  tokens.forEach((token, i) => {
    open.push(token);
    let text = decoder.decode(Uint8Array.from(token.bytes), { stream: i < tokens.length - 1 });
    if (!text && i < tokens.length - 1) return;
    if (!groups.length) text = text.trimStart();
    groups.push({ tokens: open, text: text.replaceAll("\n", "\u21b5\n") });
    open = [];
  });
  return groups;
}

function shade(place, tokens) {
  place.replaceChildren(...readable(tokens).map((group) => {
    const kl = group.tokens.reduce((sum, token) => sum + token.kl, 0);
    const span = element("span", kl < -0.05 ? "token less" : "token", group.text);
    if (group.tokens.every((token) => token.special)) span.classList.add("note");
    span.title = group.tokens.map((token) => `log-ratio ${token.kl.toFixed(3)}, probability ` +
      `${Math.exp(token.logprob).toPrecision(2)} against ` +
      `${Math.exp(token.reference_logprob).toPrecision(2)}`).join("\n");
    span.style.setProperty("--tone", kl > 0 ? "var(--up)" : "var(--down)");
    span.style.setProperty("--strength", Math.min(0.75, Math.abs(kl) / 4).toFixed(3));
    return span;
  }));
}

// A form with a text field: Enter sends, Stop and Escape end the answer. `work` may return what gets
// the focus in the field's place.
export function askForm(form, work) {
  const field = form.querySelector("textarea");
  const send = form.querySelector(".main");
  const stop = form.querySelector(".stop");
  let running = null;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const text = field.value.trim();
    if (running || !text) return;
    running = new AbortController();
    send.disabled = true;
    stop.hidden = false;
    say("Answering...");
    let next = field;
    try {
      next = (await work(text, running.signal, () => { field.value = ""; })) ?? field;
      say("");
    } catch (error) {
      say(error.name === "AbortError" ? "Stopped." : error.message, error.name !== "AbortError");
    }
    running = null;
    send.disabled = false;
    stop.hidden = true;
    next.focus();
  });
  stop.addEventListener("click", () => running?.abort());
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target === field) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
}
