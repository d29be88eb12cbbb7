// The page: one photo, a box in it, the gallery's answer, who it is, and how far the gallery is. No dependency.
const $ = (id) => document.getElementById(id);
const POLL_MS = 2000;
const BOX_STEP = 0.02; // of the photo's side, an arrow key
let key = sessionStorage.getItem("mgn-deploy-key");
let about = {};
let file = null;
let box = null; // in parts of the photo: left, top, width, height
let asked = 0; // numbers the questions, so that a late answer to an early one is dropped

async function call(path, options = {}) {
  for (;;) {
    const headers = key ? { authorization: `Bearer ${key}` } : {};
    const response = await fetch(path, { ...options, headers, credentials: "omit", cache: options.cache ?? "no-store" });
    if (response.status === 401) {
      await askForKey();
      continue;
    }
    if (!response.ok) {
      const problem = await response.json().catch(() => ({ error: `the service answered ${response.status}` }));
      throw new Error(problem.error);
    }
    return response;
  }
}

let asking = null;
function askForKey() {
  $("key-problem").hidden = !key;
  asking ??= new Promise((resolve) => {
    $("key-form").onsubmit = () => {
      key = $("key").value;
      sessionStorage.setItem("mgn-deploy-key", key);
      asking = null;
      resolve();
    };
    $("key-dialog").oncancel = (event) => event.preventDefault();
    $("key-dialog").showModal();
  });
  return asking;
}

function say(sentence, bad = false) {
  $("status").textContent = sentence;
  $("status").classList.toggle("bad", bad);
}

async function thumbnail(image, path) {
  try {
    if (!key) image.src = path;
    else image.src = URL.createObjectURL(await (await call(path, { cache: "default" })).blob());
  } catch {
    image.dispatchEvent(new Event("error"));
  }
}

// --- the photo ---

function choose(chosen) {
  if (!chosen) return;
  if (!chosen.type.startsWith("image/")) return say(`${chosen.name} is no image.`, true);
  file = chosen;
  URL.revokeObjectURL($("preview").src);
  $("preview").src = URL.createObjectURL(file);
  $("preview").onload = () => {
    const { naturalWidth: width, naturalHeight: height } = $("preview");
    $("hint").hidden = height / width > 1.3 && height / width < 5 && width * height < 2e6;
    setBox(null);
    ask().then(() => $("hint").hidden && matchMedia("(max-width: 820px)").matches && $("status").scrollIntoView());
  };
  $("preview").onerror = ask; // a kind that the browser does not show, and the service may read
  const focused = $("drop").contains(document.activeElement);
  $("drop").hidden = true;
  $("photo").hidden = false;
  if (focused) $("stage").focus({ preventScroll: true });
}

function setBox(value) {
  box = value;
  $("box").hidden = $("whole").hidden = !box;
  if (!box) return;
  $("hint").hidden = true;
  const [left, top, width, height] = box.map((part) => `${100 * part}%`);
  Object.assign($("box").style, { left, top, width, height });
}

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

let start = null;
function pointed(event) {
  const area = $("stage").getBoundingClientRect();
  return [clamp((event.clientX - area.left) / area.width, 0, 1), clamp((event.clientY - area.top) / area.height, 0, 1)];
}
$("stage").onpointerdown = (event) => {
  start = pointed(event);
  $("stage").setPointerCapture(event.pointerId);
};
$("stage").onpointermove = (event) => {
  if (!start) return;
  const [x, y] = pointed(event);
  const drawn = [Math.min(x, start[0]), Math.min(y, start[1]), Math.abs(x - start[0]), Math.abs(y - start[1])];
  if (drawn[2] > 0.02 && drawn[3] > 0.02) setBox(drawn);
};
$("stage").onpointerup = $("stage").onpointercancel = () => {
  if (start && box) ask();
  start = null;
};
let later = 0;
$("stage").onkeydown = (event) => {
  const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!way) return;
  event.preventDefault();
  let [left, top, width, height] = box ?? [0.25, 0.1, 0.5, 0.8];
  if (event.shiftKey) {
    width = clamp(width + way[0] * BOX_STEP, 0.03, 1 - left);
    height = clamp(height + way[1] * BOX_STEP, 0.03, 1 - top);
  } else {
    left = clamp(left + way[0] * BOX_STEP, 0, 1 - width);
    top = clamp(top + way[1] * BOX_STEP, 0, 1 - height);
  }
  setBox([left, top, width, height]);
  clearTimeout(later);
  later = setTimeout(ask, 600);
};

function form() {
  const body = new FormData();
  body.append("image", file, file.name || "pasted");
  if (box) {
    const { naturalWidth: width, naturalHeight: height } = $("preview");
    const [left, top, w, h] = box;
    body.append("boxes", JSON.stringify([[left * width, top * height, w * width, h * height]]));
  }
  return body;
}

// --- questions ---

async function ask() {
  if (!file) return;
  const mine = ++asked;
  say("Looking…");
  document.body.classList.add("busy");
  try {
    const query = new URLSearchParams({ k: $("k").value });
    for (const camera of document.querySelectorAll("#cameras input:checked")) query.append("camera", camera.value);
    for (const id of ["after", "before"]) if ($(id).value) query.append(id, $(id).value);
    const searching = about.gallery && call(`search?${query}`, { method: "POST", body: form() }).then((r) => r.json());
    const identifying = about.people && call("identify", { method: "POST", body: form() }).then((r) => r.json());
    const [found, who] = await Promise.allSettled([searching, identifying]);
    if (mine !== asked) return;
    showIdentity(who.value);
    if (found.reason) throw found.reason;
    if (found.value) showResults(found.value);
    else say(about.people ? "" : "This service has no gallery.");
  } catch (problem) {
    if (mine === asked) say(problem.message, true);
  } finally {
    if (mine === asked) document.body.classList.remove("busy");
  }
}

const percent = (p) => (p > 0.995 && p < 1 ? ">99%" : p < 0.005 ? "<1%" : `${Math.round(100 * p)}%`);

function showResults({ crops: [crop], prior, threshold, far, note }) {
  for (const image of document.querySelectorAll("#results img")) URL.revokeObjectURL(image.src);
  const list = $("results");
  list.replaceChildren();
  $("empty").hidden = true;
  let above = 0;
  crop.results.forEach((result, index) => {
    const same = threshold !== null && result.similarity >= threshold;
    above += same;
    if (threshold !== null && !same && index === above) list.append(line(threshold, far));
    list.append(card(result, same));
  });
  const count = crop.results.length;
  const nearest = count === 1 ? "One crop" : `The ${count} nearest crops`;
  const like = above === 0 ? "none is" : above === 1 ? "1 is" : `${above} are`;
  say(count === 0 ? "No crop passes the filters." : threshold === null ? `${nearest}.` : `${nearest}; ${like} above the threshold.`);
  const assumed = prior === null ? "" : `Probabilities assume that ${percent(prior)} of pairs are one person, as the gallery suggests.`;
  $("answer-note").textContent = [assumed, note].filter(Boolean).join(" Note: ");
  $("answer-note").hidden = !$("answer-note").textContent;
}

function line(threshold, far) {
  const item = document.createElement("li");
  item.className = "line";
  item.textContent = `threshold ${threshold.toFixed(3)}: a stranger passes it once in ${Math.round(1 / far).toLocaleString()}`;
  return item;
}

function card(result, same) {
  const item = $("result").content.firstElementChild.cloneNode(true);
  const part = (name) => item.querySelector(`.${name}`);
  const image = item.querySelector("img");
  const sure = result.probability;
  item.classList.toggle("same", same);
  image.alt = `Rank ${result.rank}: ${result.name}`;
  image.onerror = () => { image.hidden = true; part("gone").hidden = false; };
  thumbnail(image, result.thumbnail);
  part("rank").textContent = result.rank;
  part("score").textContent = sure === null ? result.similarity.toFixed(3) : percent(sure);
  part("score").title = `similarity ${result.similarity.toFixed(4)}`;
  part("meter").firstElementChild.style.width = `${100 * clamp(sure ?? result.similarity, 0, 1)}%`;
  for (const [label, value] of [["id", result.identity], ["cam", result.camera], ["s", result.time_s?.toFixed(1) ?? null]]) {
    if (value === null) continue;
    const span = document.createElement("span");
    span.textContent = `${label} ${value}`;
    part("who").append(span);
  }
  part("file").textContent = part("file").title = result.name;
  return item;
}

function showIdentity(answer) {
  const who = answer && answer.answers[0];
  $("identity").hidden = !who;
  if (!who) return;
  const nobody = who.probability < 0.5 ? "Not sure enough to name one" : `Nobody who is enrolled (${percent(who.probability)})`;
  $("verdict").textContent = who.known === null ? "Most alike:" : who.known ? who.name : nobody;
  $("verdict").classList.toggle("known", who.known === true);
  $("candidates").replaceChildren(...who.candidates.map((candidate) => {
    const item = document.createElement("li");
    const name = document.createElement("bdi");
    const score = document.createElement("span");
    name.textContent = candidate.name;
    score.textContent = candidate.probability === null ? candidate.similarity.toFixed(3) : percent(candidate.probability);
    item.append(name, score);
    return item;
  }));
  $("identity-note").textContent = who.note ?? "";
}

// --- people ---

async function enrol() {
  const name = $("name").value.trim();
  if (!name) return $("name").focus();
  if (!file) return say("Choose a photo of the person first.", true);
  $("enrol").disabled = true;
  try {
    const body = form();
    body.append("name", name);
    const done = await (await call("enrol", { method: "POST", body })).json();
    const enrolled = done.added ? `${done.name} is enrolled with ${done.images} ${done.images === 1 ? "image" : "images"}.` : `This image of ${done.name} was enrolled already.`;
    say([enrolled, ...done.notes].join(" Note: "));
    $("name").value = "";
    await showPeople();
  } catch (problem) {
    say(problem.message, true);
  } finally {
    $("enrol").disabled = false;
  }
}

async function showPeople() {
  const { people } = await (await call("people")).json();
  $("people-count").textContent = people.length;
  $("people").replaceChildren(...people.map((person) => {
    const item = document.createElement("li");
    const name = document.createElement("bdi");
    const forget = document.createElement("button");
    name.textContent = `${person.name} (${person.images})`;
    forget.type = "button";
    forget.className = "quiet";
    forget.textContent = "Forget";
    forget.setAttribute("aria-label", `Forget ${person.name}`);
    forget.onclick = async () => {
      if (!confirm(`Forget ${person.name}?`)) return;
      try {
        await call(`people?${new URLSearchParams({ name: person.name })}`, { method: "DELETE" });
        say(`${person.name} is forgotten.`);
      } catch (problem) {
        say(problem.message, true);
      }
      await showPeople();
      document.querySelector("#enrolled summary").focus(); // the button that had the focus is gone
    };
    item.append(name, forget);
    return item;
  }));
}

// --- the gallery as it grows ---

const seen = []; // times and numbers of images of the last minute
async function watch() {
  try {
    if (!document.hidden) showStore(await (await call("store")).json());
  } catch (problem) {
    $("store-rate").textContent = problem.message;
  }
  setTimeout(watch, POLL_MS);
}

function showStore({ name, images, failures, found, cameras, seconds }) {
  $("times").hidden = !seconds;
  if (seconds) [$("after").placeholder, $("before").placeholder] = seconds.map((time) => time.toFixed(0));
  $("store").hidden = false;
  $("store-name").textContent = name;
  const failed = failures ? `, ${failures.toLocaleString()} could not be read` : "";
  const total = found === null || found <= images + failures ? "" : ` of ${found.toLocaleString()}`;
  $("store-count").textContent = `${images.toLocaleString()}${total} images embedded${failed}`;
  $("store-progress").hidden = !total;
  $("store").classList.toggle("growing", Boolean(total));
  $("store-progress").max = found ?? 1;
  $("store-progress").value = images + failures;
  seen.push([performance.now(), images]);
  while (seen.length > 30) seen.shift();
  const [[first, before]] = seen;
  const rate = (1000 * (images - before)) / Math.max(1, performance.now() - first);
  $("store-rate").textContent = rate > 0 ? `${rate.toFixed(1)} images/s` : total ? "waiting for the next rows" : "";
  const known = [...document.querySelectorAll("#cameras input")].map((one) => one.value).join();
  if (Object.keys(cameras).join() !== known) showCameras(cameras);
}

function showCameras(cameras) {
  const checked = new Set([...document.querySelectorAll("#cameras input:checked")].map((one) => one.value));
  $("cameras").hidden = Object.keys(cameras).length < 2;
  document.querySelector("#cameras .chips").replaceChildren(...Object.keys(cameras).map((camera) => {
    const label = document.createElement("label");
    const input = document.createElement("input");
    const text = document.createElement("span");
    Object.assign(input, { type: "checkbox", value: camera, checked: checked.has(camera), onchange: ask });
    text.textContent = camera;
    text.title = `${cameras[camera].toLocaleString()} images`;
    label.append(input, text);
    return label;
  }));
}

// --- events ---

$("ask").onsubmit = (event) => event.preventDefault();
$("file").onchange = () => choose($("file").files[0]);
$("k").onchange = $("after").onchange = $("before").onchange = ask;
$("enrol").onclick = enrol;
$("name").onkeydown = (event) => { if (event.key === "Enter") { event.preventDefault(); enrol(); } };
$("whole").onclick = () => { setBox(null); ask(); $("stage").focus(); };
$("other").onclick = () => { $("file").value = ""; $("file").click(); };
document.onpaste = (event) => choose([...event.clipboardData.files][0]);
document.ondragover = (event) => { event.preventDefault(); $("drop").classList.add("over"); };
document.ondragleave = () => $("drop").classList.remove("over");
document.ondrop = (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  choose(event.dataTransfer.files[0]);
};

about = await (await call("about")).json();
$("model").textContent = `${about.model}, by ${about.backend} on ${about.device}`;
$("filters").hidden = $("answer").hidden = !about.gallery;
$("enrolment").hidden = !about.people;
if (about.people) showPeople().catch((problem) => say(problem.message, true));
if (about.gallery) watch();
document.documentElement.dataset.ready = "yes";
