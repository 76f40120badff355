// The chat page of `qlora-kit serve`: turns of one prompt and one or two answers, over the
// server's own API. What a model or the server says reaches the page as text alone.

const $ = (id) => document.getElementById(id);
const FIELDS = ["api_key", "system", "temperature", "max_tokens", "form"];
// Of {prompt, answers: [{model, text, absent}]}; absent: refused, or stopped before a text came.
const turns = [];
let running = null; // the AbortController of the answers that are coming

/** A new element with a class and a text. */
function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

/** What the API says is wrong. */
class Refusal extends Error {
  constructor(message, details = [], status = null) {
    super(message);
    this.status = status;
    this.details = details.filter(Boolean).join(" · ");
  }
}

/** The response of a path of the API, or a Refusal. */
async function call(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if ($("api_key").value) headers.Authorization = `Bearer ${$("api_key").value}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server cannot be reached.", [error.message]);
  }
  if (response.ok) return response;
  const said = (await response.json().catch(() => ({}))).error ?? {};
  const details = [said.param, said.code, `HTTP ${response.status}`];
  throw new Refusal(said.message ?? "The request failed.", details, response.status);
}

/** The objects of a stream of server-sent events, until `[DONE]`. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) throw new Refusal("The connection ended before the answer did.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((one) => one.startsWith("data:"))) {
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const object = JSON.parse(data);
      if (object.error) throw new Refusal(object.error.message, [object.error.code]);
      yield object;
    }
  }
}

/** Fill the drop-downs with what the server has, keeping what was chosen. Returns what is wrong. */
async function listModels() {
  try {
    const { data } = await (await call("v1/models")).json();
    const names = data.map((model) => model.id);
    [$("model"), $("other")].forEach((list, side) => {
      const chosen = names.includes(list.value) ? list.value : names[side] ?? names[0];
      list.replaceChildren(...names.map((name) => new Option(name, name)));
      list.value = chosen;
    });
    const adapters = data.slice(1); // the base is first
    const areText = adapters.length > 0 && adapters.every((model) => model.form === "text");
    if (areText && sessionStorage.getItem("form") === null) {
      $("form").value = "text";
      showUsual();
    }
    $("thread").querySelectorAll(":scope > .error").forEach((old) => old.remove());
  } catch (error) {
    if (!$("thread").querySelector(":scope > .error")) $("thread").append(failure(error));
    return error;
  }
}

function failure(error) {
  const made = element("div", "error", error.message);
  made.setAttribute("role", "alert");
  if (error.details) made.append(element("small", "", error.details));
  return made;
}

/** Path and body of the request for the last turn's answer on a side. */
function request(side) {
  const turn = turns.at(-1);
  const body = {
    model: turn.answers[side].model,
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const name of ["temperature", "max_tokens"]) {
    if ($(name).value !== "") body[name] = Number($(name).value);
  }
  if ($("form").value === "text") {
    // As in rows of training: the line end comes before the answer.
    const prompt = turn.prompt.endsWith("\n") ? turn.prompt : `${turn.prompt}\n`;
    return ["v1/completions", { ...body, prompt }];
  }
  const messages = $("system").value ? [{ role: "system", content: $("system").value }] : [];
  for (const before of turns.slice(0, -1)) {
    const answer = before.answers[side] ?? before.answers[0];
    if (answer.absent) continue; // this side has not seen that turn
    messages.push({ role: "user", content: before.prompt });
    messages.push({ role: "assistant", content: answer.text });
  }
  messages.push({ role: "user", content: turn.prompt });
  return ["v1/chat/completions", { ...body, messages }];
}

/** Stream the answer of one side into its place. */
async function stream(side, place, signal) {
  const answer = turns.at(-1).answers[side];
  const text = place.appendChild(element("div", "text coming"));
  const node = text.appendChild(document.createTextNode(""));
  const note = place.appendChild(element("small", ""));
  const began = performance.now();
  try {
    const [path, body] = request(side);
    const response = await call(path, { method: "POST", body: JSON.stringify(body), signal });
    let tokens = null, reason = null;
    for await (const { choices: [choice], usage } of events(response)) {
      const piece = choice?.delta?.content ?? choice?.text ?? "";
      answer.text += piece;
      node.appendData(piece);
      reason = choice?.finish_reason ?? reason;
      tokens = usage?.completion_tokens ?? tokens;
      follow();
    }
    const seconds = (performance.now() - began) / 1000;
    const count = tokens === 1 ? "1 token" : `${tokens} tokens`;
    const parts = tokens === null ? [] : [`${count} in ${seconds.toFixed(1)} s`];
    if (reason === "length") parts.push("cut at the most new tokens");
    note.textContent = parts.join(" · ");
  } catch (error) {
    answer.absent = !answer.text;
    if (error.name === "AbortError") note.textContent = "stopped";
    else note.before(failure(error));
    askForKey(error);
  }
  text.classList.remove("coming");
}

/** Keep the end of the thread in sight, unless the reader has scrolled away from it. */
function follow(always = false) {
  const thread = $("thread");
  const below = thread.scrollHeight - thread.scrollTop - thread.clientHeight;
  if (always || below < 120) thread.scrollTop = thread.scrollHeight;
}

/** Add a turn: the prompt, and an answer of each chosen model, all streamed at once. */
async function send() {
  const prompt = $("prompt").value;
  if (running || !prompt.trim() || !$("model").value) return;
  $("welcome").hidden = true;
  const models = [$("model").value, ...($("both").checked ? [$("other").value] : [])];
  turns.push({ prompt, answers: models.map((model) => ({ model, text: "" })) });
  const turn = element("article", models.length > 1 ? "turn two" : "turn");
  turn.append(element("div", "prompt", prompt));
  const places = models.map((model) => {
    const place = turn.appendChild(element("section", "answer"));
    place.append(element("h3", "", model));
    return place;
  });
  $("thread").append(turn);
  $("prompt").value = "";
  grow();
  follow(true);
  const control = new AbortController();
  setRunning(control);
  await Promise.all(places.map((place, side) => stream(side, place, control.signal)));
  if (running !== control) return; // a new chat has begun meanwhile
  setRunning(null);
  $("status").textContent = control.signal.aborted ? "Stopped." : "The answer is complete.";
  follow();
}

function setRunning(control) {
  const isLost = [$("send"), $("stop")].includes(document.activeElement); // for it gets hidden
  running = control;
  $("send").hidden = Boolean(control);
  $("stop").hidden = !control;
  // Readers of the screen hear an answer once it is whole, not word by word.
  $("thread").setAttribute("aria-busy", Boolean(control));
  if (control) $("status").textContent = "The answer is coming.";
  if (isLost) $("prompt").focus();
}

function freshChat() {
  running?.abort();
  setRunning(null);
  turns.length = 0;
  $("thread").replaceChildren($("welcome"));
  $("welcome").hidden = false;
  $("status").textContent = "";
  $("prompt").focus();
  listModels();
}

/** Open the settings where an error says that the key is missing or wrong. */
function askForKey(error) {
  if (error?.status !== 401) return;
  if (!$("settings").open) $("settings").showModal();
  $("key_error").textContent = error.message;
  $("key_error").className = "error";
  $("key_error").hidden = false;
  $("api_key").focus();
}

/** Ask for the key where the page opens without one: nothing is wrong yet. */
function greet(error) {
  askForKey(error);
  if (error?.status !== 401 || $("api_key").value) return;
  $("thread").querySelectorAll(":scope > .error").forEach((old) => old.remove());
  $("key_error").textContent = "This server asks for a key.";
  $("key_error").className = "";
}

/** The height of the text that is being written. */
function grow() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight + 2}px`;
}

/** What the server takes where no number is given: of plain text the API's own 16 tokens. */
function showUsual() {
  $("max_tokens").placeholder = $("form").value === "text" ? "16" : "the server's";
}

for (const name of FIELDS) {
  $(name).value = sessionStorage.getItem(name) ?? $(name).value;
  $(name).addEventListener("input", () => sessionStorage.setItem(name, $(name).value));
}
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("prompt").addEventListener("input", grow);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("settings").open) running?.abort();
});
$("stop").addEventListener("click", () => running?.abort());
$("fresh").addEventListener("click", freshChat);
$("both").addEventListener("change", () => { $("against").hidden = !$("both").checked; });
$("adjust").addEventListener("click", () => $("settings").showModal());
// A dialog that opens itself again cannot be left: what is wrong stands in the thread then.
$("settings").addEventListener("close", () => {
  $("key_error").hidden = true;
  listModels();
});
window.addEventListener("focus", () => listModels());
$("form").addEventListener("change", showUsual);
showUsual();
$("against").hidden = !$("both").checked;
listModels().then(greet);
