// Replaces the live part of the view whenever the server says that it changed.
"use strict";
const live = document.getElementById("live");
const state = document.getElementById("state");
if (live && live.dataset.view && "EventSource" in window) {
  const events = new EventSource("/events?view=" + encodeURIComponent(live.dataset.view));
  events.onopen = () => { state.textContent = "live"; state.className = "live"; };
  events.onmessage = (event) => { live.innerHTML = event.data; };
  events.onerror = () => { state.textContent = "not connected"; state.className = ""; };
}
