"use strict";

// Texts of others reach the page by textContent alone. The secret is the part of the address after #.
const SAID = { 1: "the first answer", 2: "the second answer", 0: "a tie", s: "skipped" };
const token = location.hash.slice(1);
const at = (id) => document.getElementById(id);
const pause = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));
let labeler = sessionStorage.getItem("labeler") || "";
let now = null; // what the server last said: the pair, and how far the labeler is
let since = 0; // when the pair appeared, by performance.now()
let busy = false; // an answer is on its way: a key would be for a pair not seen yet

class Refusal extends Error {}

async function call(action, fields) {
  const response = await fetch(`/api/${action}`, {
    method: "POST",
    headers: { Authorization: `Bearer ${token}`, "Content-Type": "application/json" },
    body: JSON.stringify({ labeler, ...fields }),
  });
  const said = await response.json();
  if (response.status < 500 && !response.ok) throw new Refusal(said.error);
  if (!response.ok) throw new Error(said.error);
  return said;
}

// Until the server has it: it may be down, and come back. Sent twice it is stored once.
async function deliver(action, fields) {
  sessionStorage.setItem("pending", JSON.stringify({ labeler, action, fields }));
  for (;;) {
    try {
      const said = await call(action, fields);
      sessionStorage.removeItem("pending");
      return said;
    } catch (error) {
      if (error instanceof Refusal) {
        sessionStorage.removeItem("pending");
        throw error;
      }
      const why = error instanceof TypeError ? "The server does not answer." : `${error.message}.`;
      note(`${why} What you pressed is kept and sent again.`, true);
      await pause(1);
    }
  }
}

async function send(action, fields, stored) {
  if (busy) return;
  busy = true;
  buttons();
  try {
    const said = await deliver(action, fields);
    note(said.note || stored, Boolean(said.note));
    show(said);
  } catch (error) {
    note(error.message, true);
  }
  busy = false;
  buttons();
  if (now && !now.shown) wait();
}

function choose(choice) {
  if (busy || !now || !now.shown) return;
  const seconds = Math.round(performance.now() - since) / 1000;
  send("answer", { shown: now.shown.id, choice, seconds }, `Stored: ${SAID[choice]}.`);
}

function undo() {
  if (now && now.last) send("undo", { shown: now.last }, "Taken back: answer it again.");
}

function note(text, trouble = false) {
  at("note").textContent = text;
  at("note").classList.toggle("trouble", trouble);
}

function buttons() {
  const ready = Boolean(now && now.shown) && !busy;
  for (const each of document.querySelectorAll("[data-choice]")) each.disabled = !ready;
  at("undo").disabled = busy || !(now && now.last);
}

function show(said) {
  const before = now && now.shown && now.shown.id;
  now = said;
  at("start").hidden = true;
  for (const id of ["choices", "rename", "retraining"]) at(id).hidden = false;
  document.querySelector(".bar").hidden = false;
  at("rename").textContent = labeler;
  at("progress").max = said.of;
  at("progress").value = said.done;
  const skipped = said.skipped ? `, ${said.skipped} skipped` : "";
  at("yours").textContent = `${said.yours} answered by you${skipped}`;
  at("all").textContent = `${said.done} of ${said.of} votes`;
  at("vote").hidden = !said.shown;
  at("message").hidden = Boolean(said.shown);
  for (const each of [at("preferences"), at("skip")]) each.hidden = !said.shown;
  if (!said.shown) at("message").textContent = MESSAGES[said.state](said);
  if (said.shown && said.shown.id !== before) showPair(said.shown);
  buttons();
}

function showPair(pair) {
  at("prompt").replaceChildren(
    ...pair.turns.map((turn) => {
      const element = document.createElement("div");
      element.className = "turn";
      if (pair.turns.length > 1) {
        const role = document.createElement("i");
        role.textContent = turn.role;
        element.append(role);
      }
      element.append(turn.content);
      return element;
    }),
  );
  document.querySelectorAll("#answers article").forEach((article, i) => {
    const said = article.querySelector(".said");
    said.textContent = pair.answers[i] || "an empty answer";
    said.classList.toggle("empty", !pair.answers[i]);
    article.querySelector(".cut").hidden = !pair.cut[i];
  });
  scrollTo(0, 0);
  at("prompt").scrollTop = at("prompt").scrollHeight;
  since = performance.now();
}

const MESSAGES = {
  sampling: () => "The next answers are being sampled.",
  failed: (said) => `There is nothing to compare: ${said.problem}.`,
  done: (said) => {
    const [same, again] = said.repeats;
    const [right, checks] = said.checks;
    const twice = again ? ` Of ${again} pairs that you saw twice you answered ${same} alike.` : "";
    const known = checks ? ` Of ${checks} whose better answer was known you chose ${right}.` : "";
    return `Nothing is left for you to compare. Thank you.${twice}${known}`;
  },
};

async function wait() {
  while (now && !now.shown && !busy) {
    await pause(now.state === "sampling" ? 0.3 : 3);
    if (!busy) show(await call("next", {}).catch(() => now));
  }
}

async function begin(name) {
  labeler = name;
  try {
    const said = await call("next", {});
    sessionStorage.setItem("labeler", labeler);
    localStorage.setItem("labeler", labeler);
    document.activeElement.blur(); // keys are answers from here on
    note("");
    show(said);
    follow();
    if (!said.shown) wait();
  } catch (error) {
    ask(error instanceof Refusal ? error.message : "The server does not answer.");
  }
}

function ask(why) {
  labeler = "";
  sessionStorage.removeItem("labeler");
  now = null;
  for (const id of ["vote", "choices", "rename", "retraining"]) at(id).hidden = true;
  document.querySelector(".bar").hidden = true;
  at("start").hidden = false;
  at("message").hidden = !why;
  at("message").textContent = why;
  at("name").value = localStorage.getItem("labeler") || "";
  at("name").focus();
}

const percent = (share) => `${(100 * share).toFixed(0)} %`;

function showRound(round) {
  const busyTraining = round.state === "running";
  at("retrain").disabled = busyTraining;
  const about = `${round.trained} votes trained on, ${round.held_out} held out`;
  if (round.state === "none") {
    at("round").textContent = "None is trained yet. A fifth of the prompts is held out to judge it by.";
  } else if (busyTraining) {
    at("round").textContent = `Round ${round.round} is being trained: ${about}.`;
  } else if (round.state === "failed") {
    at("round").textContent = `Round ${round.round} failed: ${round.why}`;
  } else {
    const after = document.createElement("b");
    after.textContent = `${percent(round.after)} after`;
    const [low, high] = round.interval.map(percent);
    at("round").replaceChildren(
      `Round ${round.round}, agreement with held-out votes: ${percent(round.before)} before (${round.against}), `,
      after,
      ` (95 % interval ${low} to ${high}); ${about}.`,
    );
  }
  return busyTraining;
}

async function follow() {
  let running = true;
  while (running) {
    running = showRound(await call("status", {}).catch(() => ({ state: "running" })));
    if (running) await pause(2);
  }
}

async function retrain() {
  at("retrain").disabled = true;
  try {
    showRound(await call("retrain", {}));
    follow();
  } catch (error) {
    at("round").textContent = error.message;
    at("retrain").disabled = false;
  }
}

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target instanceof HTMLInputElement) return;
  const key = event.key.toLowerCase();
  if (key in SAID) choose(key);
  else if (key === "u") undo();
  else return;
  event.preventDefault();
});
for (const each of document.querySelectorAll("[data-choice]")) {
  each.addEventListener("click", () => choose(each.dataset.choice));
}
at("undo").addEventListener("click", undo);
at("rename").addEventListener("click", () => ask(""));
at("retrain").addEventListener("click", retrain);
at("start").addEventListener("submit", (event) => {
  event.preventDefault();
  if (at("name").value.trim()) begin(at("name").value.trim());
});

(async () => {
  const pending = JSON.parse(sessionStorage.getItem("pending") || "null");
  if (pending && pending.labeler === labeler) {
    await deliver(pending.action, pending.fields).catch(() => null);
  }
  if (labeler) begin(labeler);
  else ask("");
})();
