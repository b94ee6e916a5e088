"use strict";
// The server renders the page; this script loads it again and updates what is shown.
const POLL_SECONDS = 2, HIDDEN_POLL_SECONDS = 30, TIMEOUT_SECONDS = 5;
const connection = document.getElementById("connection");
const icon = document.querySelector("link[rel=icon]");
let timer, serverClock, lastAnswer;

// Change only what differs, so that focus, selection and a screen reader's position stay.
function sync(shown, fresh) {
  if (shown.isEqualNode(fresh)) return;
  if (shown.nodeName !== fresh.nodeName) {
    shown.replaceWith(fresh);
    return;
  }
  if (shown.nodeType !== Node.ELEMENT_NODE) {
    shown.data = fresh.data;
    return;
  }
  for (const { name } of [...shown.attributes]) if (!fresh.hasAttribute(name)) shown.removeAttribute(name);
  for (const { name, value } of fresh.attributes) shown.setAttribute(name, value);
  syncChildren(shown, [...fresh.childNodes]);
}

// Match children by key, such as a run's; match the others by position.
function syncChildren(shown, fresh) {
  const key = (node) => node.dataset?.key;
  const wanted = new Set(fresh.map(key));
  const keyed = new Map(), others = [];
  for (const child of [...shown.childNodes]) {
    if (key(child) === undefined) others.push(child);
    else if (wanted.has(key(child))) keyed.set(key(child), child);
    else child.remove();
  }
  const surplus = others.length - fresh.filter((node) => key(node) === undefined).length;
  if (surplus > 0) others.splice(-surplus).forEach((child) => child.remove());
  let next = shown.firstChild;
  for (const node of fresh) {
    const known = key(node) === undefined ? others.shift() : keyed.get(key(node));
    if (known === undefined) {
      shown.insertBefore(node, next);
    } else {
      if (known === next) next = next.nextSibling;
      else shown.insertBefore(known, next);
      sync(known, node);
    }
  }
}

function spoken(seconds) {
  if (seconds < 120) return `${Math.floor(seconds)} s ago`;
  return seconds < 7200 ? `${Math.floor(seconds / 60)} min ago` : `${Math.floor(seconds / 3600)} h ago`;
}

// Ages use the server's clock, not this machine's.
function showAges() {
  if (serverClock === undefined) return;
  const now = serverClock + performance.now();
  for (const time of document.querySelectorAll("time[data-age]")) {
    const text = spoken(Math.max(0, now - Date.parse(time.dateTime)) / 1000);
    if (time.textContent !== text) time.textContent = text;
  }
}

function showConnection(isDead, text) {
  document.documentElement.classList.toggle("dead", isDead);
  const role = isDead ? "alert" : "status";
  if (connection.getAttribute("role") !== role) connection.setAttribute("role", role);
  if (connection.textContent !== text) connection.textContent = text;
}

// Without a user name and password in the address: fetch() refuses them.
const address = location.origin + location.pathname;

async function ask() {
  const since = lastAnswer ? ` since ${lastAnswer.toLocaleString()}` : "";
  let response, text;
  try {
    response = await fetch(address, { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_SECONDS * 1000) });
    text = await response.text();
  } catch (error) {
    const reason = error.name === "TimeoutError" ? `none within ${TIMEOUT_SECONDS} s` : "it cannot be reached";
    throw new Error(`No answer from the trainer${since}: ${reason}.`);
  }
  if (!response.ok) throw new Error(`Nothing new${since}: the answer is ${response.status} ${response.statusText}.`);
  const fresh = new DOMParser().parseFromString(text, "text/html");
  if (!fresh.querySelector("main#runs")) throw new Error(`Nothing new${since}: something else answers at this address.`);
  return { fresh, date: Date.parse(response.headers.get("Date")) };
}

function show({ fresh, date }) {
  serverClock = date - performance.now();
  sync(document.querySelector("main"), fresh.querySelector("main"));
  sync(icon, fresh.querySelector("link[rel=icon]"));
  document.title = fresh.title;
  showConnection(false, "Live");
  showAges();
  lastAnswer = new Date();
}

function showDead(reason) {
  showConnection(true, `${reason} Below is the last known state.`);
  icon.href = icon.href.replace(/fill='\w+'/, "fill='gray'");
  if (!document.title.startsWith("No answer")) document.title = `No answer · ${document.title}`;
}

async function poll() {
  clearTimeout(timer);
  try {
    show(await ask());
  } catch (error) {
    showDead(error.message);
  }
  timer = setTimeout(poll, 1000 * (document.hidden ? HIDDEN_POLL_SECONDS : POLL_SECONDS));
}

const docs = document.getElementById("docs");
function openDocs() {
  docs.open = true;
}

docs.open = location.hash === "#docs"; // open in the source, for browsers without scripts
document.querySelector('a[href="#docs"]').addEventListener("click", openDocs);
document.addEventListener("visibilitychange", () => document.hidden || poll());
showConnection(false, "Connecting");
setInterval(showAges, 1000);
poll();
