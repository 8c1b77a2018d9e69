// The page's two tabs: a conversation with one model, and two models side by side with a vote.

import { $, answerView, api, askForm, element, say, state, streamChat, withSystem } from "./page.js";

const turns = [];
let round = null; // what the next vote is about

async function start() {
  const health = await (await api("health")).json();
  state.reward = health.reward;
  if (health.key_required && !sessionStorage.getItem("key")) {
    $("key-form").hidden = false;
    say("Give the server's key to begin.");
    $("key").focus();
    return;
  }
  const { data } = await (await api("v1/models")).json();
  state.models = data.map((model) => model.id);
  for (const select of [...document.querySelectorAll(".models"), $("reference")]) {
    select.replaceChildren(...state.models.map((name) => new Option(name)));
  }
  const prefer = (id, ...names) => {
    $(id).value = names.find((name) => state.models.includes(name)) ?? state.models[0];
  };
  prefer("chat-model", "policy", "sft");
  prefer("model-a", "sft");
  prefer("model-b", "policy");
  prefer("reference", "sft");
  say("");
  introduce(await (await api("v1/run")).json());
  if (document.activeElement === document.body) $("chat-text").focus({ preventScroll: true });
}

const ROLES = {
  base: "the backbone as it was before tuning",
  sft: "after supervised fine-tuning",
  policy: "after reinforcement learning",
  ema: "the average of the policies",
};

// What is shown before the first message.
function introduce({ run, knows, examples, ...tally }) {
  const roles = element("dl");
  for (const name of state.models) {
    roles.append(element("dt", "", name), element("dd", "", ROLES[name] ?? "a loaded adapter"));
  }
  $("intro").replaceChildren(element("h2", "", run), roles);
  if (knows) $("intro").append(element("p", "note", knows));
  const here = element("div", "examples");
  $("intro").append(here);
  for (const [place, form] of [[here, "chat-form"], [$("compare-examples"), "compare-form"]]) {
    place.hidden = !examples.length;
    place.replaceChildren(element("p", "", "Prompts that training has not seen:"),
      ...examples.map((text) => example(text, $(form))));
  }
  $("intro").hidden = turns.length > 0;
  count(tally);
}

function example(text, form) {
  const made = element("button", "", text);
  made.type = "button";
  made.addEventListener("click", () => {
    form.querySelector("textarea").value = text;
    form.requestSubmit();
  });
  return made;
}

function count({ votes, better, tie, both_bad: bad }) {
  const won = Object.entries(better).map(([name, number]) => `${name} better ${number}`);
  $("tally").textContent = [`Votes: ${votes}`, ...won, `tie ${tie}`, `both bad ${bad}`].join(", ");
  $("tally").hidden = !votes;
}

$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value);
  $("key-form").hidden = true;
  await start().catch((error) => say(error.message, true));
});

// --- chat

askForm($("chat-form"), async (text, signal, clear) => {
  const model = $("chat-model").value;
  const asked = { role: "user", content: text };
  const messages = withSystem([...turns, asked]);
  const mine = element("li", "user");
  mine.append(element("div", "who", "you"), element("div", "text", text));
  const theirs = element("li", "assistant");
  const place = element("div", "answer");
  theirs.append(element("div", "who", model), place);
  $("intro").hidden = true;
  $("log").append(mine, theirs);
  clear();
  const view = answerView(place);
  let kept = false;
  try {
    await streamChat(model, messages, (piece) => {
      view.add(piece);
      $("log").scrollTop = $("log").scrollHeight;
    }, signal);
    kept = true;
  } finally {
    view.finish();
    view.addTools(model, messages);
    if (kept || view.content) turns.push(asked, { role: "assistant", content: view.content });
    else {
      mine.remove();
      theirs.remove();
      $("intro").hidden = turns.length > 0;
      $("chat-text").value = text;
    }
    $("log").scrollTop = $("log").scrollHeight;
  }
});

$("clear").addEventListener("click", () => {
  turns.length = 0;
  $("log").replaceChildren();
  $("intro").hidden = false;
  $("chat-text").focus();
});

// --- compare

askForm($("compare-form"), async (text, signal) => {
  const models = [$("model-a").value, $("model-b").value];
  const blind = $("blind").checked;
  if (blind && crypto.getRandomValues(new Uint8Array(1))[0] % 2) models.reverse();
  const messages = withSystem([{ role: "user", content: text }]);
  round = null;
  $("vote-form").hidden = true;
  $("compare-examples").hidden = true;
  $("sides").hidden = false;
  const views = ["a", "b"].map((side, i) => {
    $(`title-${side}`).textContent = side.toUpperCase() + (blind ? "" : `: ${models[i]}`);
    return answerView($(`answer-${side}`));
  });
  const ends = await Promise.allSettled(models.map((model, i) =>
    streamChat(model, messages, (piece) => views[i].add(piece), signal)));
  views.forEach((view) => view.finish());
  const reveal = () => views.forEach((view, i) => {
    $(`title-${"ab"[i]}`).textContent = `${"AB"[i]}: ${models[i]}`;
    view.addTools(models[i], messages);
  });
  if (!blind) reveal();
  const failed = ends.find((end) => end.status === "rejected");
  if (failed) throw failed.reason;
  round = { messages, models, answers: views.map((view) => view.content), reveal, blind };
  $("vote-form").hidden = false;
  return $("vote-form"); // so that the keys 1-4 vote, and a second Enter does not
});

async function vote(verdict) {
  if (!round) return;
  const voted = round;
  round = null; // a key that is held down votes once
  const { messages, models, answers, reveal, blind } = voted;
  const body = { messages, models, answers, verdict, reason: $("reason").value };
  try {
    const told = await (await api("v1/votes", body)).json();
    if (blind) reveal();
    $("vote-form").hidden = true;
    $("reason").value = "";
    $("compare-text").focus();
    say(`Vote kept; ${told.votes} in all.`);
  } catch (error) {
    round ??= voted;
    say(error.message, true);
    return;
  }
  await api("v1/run").then((told) => told.json()).then(count, (error) => say(error.message, true));
}

for (const each of document.querySelectorAll("[data-verdict]")) {
  each.addEventListener("click", () => vote(each.dataset.verdict));
}
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || $("compare").hidden) return;
  document.querySelector(`[data-verdict][aria-keyshortcuts="${CSS.escape(event.key)}"]`)?.click();
});
$("vote-form").addEventListener("submit", (event) => event.preventDefault());

$("export").addEventListener("click", async () => {
  try {
    const file = await (await api("v1/votes")).blob();
    if (!file.size) {
      say("There are no votes yet.");
      return;
    }
    const link = element("a");
    link.href = URL.createObjectURL(file);
    link.download = "votes.jsonl";
    link.click();
    URL.revokeObjectURL(link.href);
  } catch (error) {
    say(error.message, true);
  }
});

// --- tabs and theme

const tabs = [...document.querySelectorAll("[role=tab]")];

function show(tab) {
  for (const each of tabs) {
    const chosen = each === tab;
    each.setAttribute("aria-selected", String(chosen));
    each.tabIndex = chosen ? 0 : -1;
    $(each.getAttribute("aria-controls")).hidden = !chosen;
  }
}

tabs.forEach((tab, i) => {
  tab.addEventListener("click", () => {
    show(tab);
    $(tab.getAttribute("aria-controls")).querySelector("textarea").focus();
  });
  tab.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = tabs[(i + 1) % tabs.length];
    show(other);
    other.focus();
  });
});

const themes = ["system", "light", "dark"];

function applyTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
  localStorage.setItem("theme", theme);
}

$("theme").addEventListener("click", () => {
  const now = themes.indexOf(document.documentElement.dataset.theme);
  applyTheme(themes[(now + 1) % themes.length]);
});
applyTheme(themes.includes(localStorage.getItem("theme")) ? localStorage.getItem("theme") : "system");

start().catch((error) => say(error.message, true));
