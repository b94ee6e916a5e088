"use strict";
// The server renders the page, and this brings what is shown up to the one that it renders now.
const POLL_SECONDS = 2, HIDDEN_POLL_SECONDS = 30, TIMEOUT_SECONDS = 5;
const connection = document.getElementById("connection");
let timer, serverClock, lastAnswer;

// Changes no more than differs, so that focus, selection and a screen reader's place stay where they are.
function sync(shown, fresh) {
  if (shown.isEqualNode(fresh)) return;
  if (shown.nodeName !== fresh.nodeName || shown.childNodes.length !== fresh.childNodes.length) {
    shown.replaceWith(fresh);
    return;
  }
  if (shown.nodeType !== Node.ELEMENT_NODE) {
    shown.data = fresh.data;
    return;
  }
  for (const { name } of [...shown.attributes]) if (!fresh.hasAttribute(name)) shown.removeAttribute(name);
  for (const { name, value } of fresh.attributes) shown.setAttribute(name, value);
  const freshChildren = [...fresh.childNodes];
  [...shown.childNodes].forEach((child, index) => sync(child, freshChildren[index]));
}

function spoken(seconds) {
  if (seconds < 120) return `${Math.floor(seconds)} s ago`;
  return seconds < 7200 ? `${Math.floor(seconds / 60)} min ago` : `${Math.floor(seconds / 3600)} h ago`;
}

// Ages are by the server's clock, whatever this machine believes.
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
  connection.setAttribute("role", isDead ? "alert" : "status");
  if (connection.textContent !== text) connection.textContent = text;
}

async function poll() {
  clearTimeout(timer);
  try {
    const response = await fetch("/", { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_SECONDS * 1000) });
    if (!response.ok) throw new Error(`it answers ${response.status} ${response.statusText}`);
    const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
    serverClock = Date.parse(response.headers.get("Date")) - performance.now();
    lastAnswer = new Date();
    sync(document.querySelector("main"), fresh.querySelector("main"));
    sync(document.querySelector("link[rel=icon]"), fresh.querySelector("link[rel=icon]"));
    document.title = fresh.title;
    showConnection(false, "Live");
    showAges();
  } catch (error) {
    const since = lastAnswer ? ` since ${lastAnswer.toLocaleTimeString()}` : "";
    const reason = error instanceof TypeError ? "it cannot be reached" : error.message;
    showConnection(true, `No answer from the trainer${since}: ${reason}. Below is the last that it said.`);
    if (!document.title.startsWith("No answer")) document.title = `No answer · ${document.title}`;
  }
  timer = setTimeout(poll, 1000 * (document.hidden ? HIDDEN_POLL_SECONDS : POLL_SECONDS));
}

function openDocs() {
  if (location.hash === "#docs") document.getElementById("docs").open = true;
}

document.addEventListener("visibilitychange", () => document.hidden || poll());
addEventListener("hashchange", openDocs);
openDocs();
showConnection(false, "Connecting");
setInterval(showAges, 1000);
poll();
