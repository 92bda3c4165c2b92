// The page of fps-live: asks for a stream over one WebSocket, plays its fragments by Media Source Extensions, and shows its figures.
"use strict";

const CODECS = ["avc1.640028", "avc1.42e01e", "vp09.00.40.08"]; // best first; the server names the exact one
const KEEP = {
  behind: 20, // seconds that stay in the player behind what is shown
  saved: 256 * 2 ** 20, // bytes for "Save mp4"; of a longer stream the last ones
};
const Source = window.MediaSource || window.ManagedMediaSource; // iPhones have the second alone
const $ = (id) => document.getElementById(id);
const video = $("video");

// The fragments of one stream on their way into the <video>. Memory is bounded: what was shown is removed.
class Player {
  constructor(mime) {
    this.blocks = 0; // appended so far
    this.ended = false;
    this.broken = false; // whether it can't be played
    this.queue = []; // {bytes, block}
    this.source = new Source();
    this.url = URL.createObjectURL(this.source);
    video.src = this.url;
    this.source.addEventListener("sourceopen", () => {
      try {
        this.buffer = this.source.addSourceBuffer(mime);
      } catch (error) {
        this.give_up(error.message);
        return;
      }
      this.buffer.addEventListener("updateend", () => this.pump());
      this.pump();
    }, { once: true });
  }

  push(bytes, block) {
    this.queue.push({ bytes, block });
    this.pump();
  }

  end() {
    this.ended = true;
    this.pump();
  }

  // From here on it counts what comes and lets it go: the stream goes on, and can be saved.
  give_up(reason) {
    if (this.broken) return;
    this.broken = true;
    if (this === player) fail(`this browser can't play it (${reason}); the stream goes on and can be saved, Stop ends it`);
    this.pump();
  }

  get ahead() {
    if (this.broken) return 0;
    const ranges = video.buffered;
    return ranges.length ? Math.max(0, ranges.end(ranges.length - 1) - video.currentTime) : 0;
  }

  pump() {
    if (this.broken) {
      this.blocks += this.queue.filter((part) => part.block).length;
      this.queue = [];
      return;
    }
    if (!this.buffer || this.buffer.updating || this.source.readyState !== "open") return;
    try {
      this.append();
    } catch (error) {
      this.give_up(error.message);
    }
  }

  append() {
    const held = this.buffer.buffered;
    if (held.length && video.currentTime - held.start(0) > 2 * KEEP.behind) {
      this.buffer.remove(0, video.currentTime - KEEP.behind);
      return;
    }
    const next = this.queue[0];
    if (!next) {
      if (this.ended) this.source.endOfStream();
      return;
    }
    try {
      if (next.bytes.byteLength) this.buffer.appendBuffer(next.bytes);
    } catch (error) {
      if (error.name !== "QuotaExceededError") throw error;
      const until = video.currentTime - 1; // what is full gets room when it has been shown
      if (held.length && until > held.start(0)) this.buffer.remove(0, until);
      else setTimeout(() => this.pump(), 500);
      return;
    }
    this.queue.shift();
    if (next.block) this.blocks += 1;
    if (!next.bytes.byteLength) this.pump();
  }

  close() {
    URL.revokeObjectURL(this.url);
  }
}

// What was received, as a file.
class Recording {
  constructor() {
    this.head = null;
    this.parts = [];
    this.size = 0;
    this.dropped = false;
  }

  add(bytes) {
    if (!this.head) {
      this.head = new Blob([bytes]);
      return;
    }
    this.parts.push(new Blob([bytes])); // a browser keeps large ones on disk
    this.size += bytes.byteLength;
    while (this.size > KEEP.saved && this.parts.length > 1) {
      this.size -= this.parts.shift().size;
      this.dropped = true;
    }
  }

  async file() {
    const parts = [...this.parts];
    if (this.dropped && parts.length) parts[0] = await behindFirstFrame(parts[0]);
    return new Blob([this.head, ...parts], { type: "video/mp4" });
  }
}

// A block begins with a keyframe, but what came with it begins with the last frame before it: one moof and its mdat.
async function behindFirstFrame(part) {
  const view = new DataView(await part.arrayBuffer());
  const first = view.getUint32(0);
  return part.slice(first + view.getUint32(first));
}

video.addEventListener("error", () => {
  if (player && video.error) player.give_up(video.error.message || `error ${video.error.code}`);
});

let socket = null;
let ready = false; // whether the server has said that it has something for this browser
let player = null;
let recording = null;
let blockNext = false; // whether the next bytes are a block's
let fps = 16;
let running = false;
let paused = false;
let drawn = null; // the prompt of the last block
let asked = []; // prompts that were sent, for the arrow keys
let place = 0;

function say(message) {
  if (socket && socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
}

function state(text, kind) {
  if ($("state").textContent !== text) $("state").textContent = text; // it is read aloud
  $("state").dataset.state = kind;
}

function veil(text) {
  $("veil").hidden = !text;
  $("veil-text").textContent = text || "";
}

function fail(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

function buttons() {
  const open = socket && socket.readyState === WebSocket.OPEN;
  const focused = document.querySelector(".bar :focus-visible"); // of a keyboard
  $("send").disabled = !open || !ready;
  $("send").textContent = running ? "Send" : "Start";
  $("pause").disabled = $("stop").disabled = !running;
  $("pause").textContent = paused ? "Resume" : "Pause";
  $("how").disabled = !running;
  $("save").disabled = !recording || !recording.parts.length;
  if (focused && focused.disabled) ($("send").disabled ? $("prompt") : $("send")).focus(); // else it would be nowhere
}

const clock = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;

function bytes(n) {
  return n >= 2 ** 30 ? `${(n / 2 ** 30).toFixed(1)} GiB` : `${Math.round(n / 2 ** 20)} MiB`;
}

function remember(prompt, where) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  const when = document.createElement("span");
  button.type = "button";
  button.append(prompt, when);
  when.textContent = where;
  button.addEventListener("click", () => {
    $("prompt").value = prompt;
    $("prompt").focus();
  });
  item.append(button);
  $("history").prepend(item);
  $("past").hidden = false;
  while ($("history").children.length > 100) $("history").lastChild.remove();
}

const on = {
  ready(message) {
    ready = true;
    fps = message.fps;
    $("model").textContent = message.model || "";
    $("note").textContent = message.note || "";
    $("note").hidden = !message.note;
    if (message.prompt && !$("prompt").value) $("prompt").value = message.prompt;
    $("history").replaceChildren();
    for (const example of (message.examples || []).toReversed()) remember(example, "example");
    state("ready", "off");
    veil(message.busy ? "Somebody else is watching. Start works when they have left." : "Write a prompt and press Start.");
  },

  refused(message) {
    fail(message.text);
    state("refused", "off");
  },

  waiting() {
    state("waiting for the end of the last block", "busy");
  },

  starting() {
    running = true;
    paused = false;
    drawn = null;
    if (player) player.close();
    player = null; // how far the video before is says nothing of this one
    fail("");
    state("starting", "busy");
    veil("The first block is being made. The very first time, programs are compiled before: that can take a minute or more.");
  },

  video(message) {
    fps = message.fps;
    if (player) player.close();
    player = new Player(message.mime);
    recording = new Recording();
    blockNext = false;
    document.querySelector(".screen").style.setProperty("--ratio", message.width / message.height);
  },

  block(message) {
    blockNext = true;
    const seconds = message.seconds;
    const all = Object.values(seconds).reduce((a, b) => a + b, 0);
    $("fps").textContent = message.frames_per_second.toFixed(1);
    $("block").textContent = message.block + 1;
    $("took").textContent = `${all.toFixed(2)} s for ${message.frames[1] - message.frames[0]} frames`;
    $("stages").replaceChildren();
    $("stage-words").replaceChildren();
    for (const [name, took] of Object.entries(seconds)) {
      const part = document.createElement("div");
      part.dataset.stage = name;
      part.style.flexGrow = took / all;
      $("stages").append(part);
      const mark = document.createElement("i");
      mark.dataset.stage = name;
      const word = document.createElement("span");
      word.append(mark, `${name} ${took.toFixed(2)} s`);
      $("stage-words").append(word);
    }
    const cache = message.cache;
    $("cache").max = cache.of;
    $("cache").value = cache.frames;
    $("fill").textContent = `${cache.frames} of ${cache.of} latent frames`;
    const held = Object.entries(message.memory).map(([where, n]) => `${bytes(n)} ${where}`);
    $("memory").textContent = held.join(", ") || "–";
    if (message.prompt !== drawn) {
      drawn = message.prompt;
      remember(drawn, clock(message.frames[0] / fps));
    }
    if (!paused) state("making video", "on");
  },

  switching() {
    state("the next block follows the new prompt", "on");
  },

  paused() {
    paused = true;
    video.pause();
    state("paused", "off");
  },

  resumed() {
    paused = false;
    play();
    state("making video", "on");
  },

  note(message) {
    fail(message.text);
  },

  error(message) {
    fail(message.text);
    if (!ready) state("not for this browser", "off");
  },

  ended(message) {
    running = paused = false;
    if (player) player.end();
    play();
    state(message.frames ? `stopped after ${message.frames} frames` : "stopped", "off");
    if (!message.frames) veil("Write a prompt and press Start.");
  },
};

function play() {
  if (player) video.play().catch(() => {}); // it is muted, and may
}

function receive(event) {
  if (typeof event.data === "string") {
    const message = JSON.parse(event.data);
    if (on[message.type]) on[message.type](message);
  } else {
    recording.add(event.data);
    player.push(event.data, blockNext);
    if (blockNext && !paused && video.paused) play();
    if (blockNext) veil("");
    blockNext = false;
  }
  buttons();
}

function connect() {
  socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/watch`);
  socket.binaryType = "arraybuffer";
  socket.addEventListener("open", () => {
    const can = (codec) => Source && Source.isTypeSupported(`video/mp4; codecs="${codec}"`);
    fail("");
    say({ type: "hello", codecs: CODECS.filter(can) });
  });
  socket.addEventListener("message", receive);
  socket.addEventListener("close", (event) => {
    if (running && player) player.end();
    ready = running = paused = false;
    state("no connection", "off");
    fail(`${event.reason || "the server is gone, or refuses this page"}; trying again`);
    buttons();
    setTimeout(connect, 3000);
  });
}

function send() {
  const prompt = $("prompt").value.trim();
  const how = document.querySelector('input[name="how"]:checked').value;
  fail("");
  say({ type: "prompt", prompt, how });
  if (prompt && asked[asked.length - 1] !== prompt) asked.push(prompt);
  asked = asked.slice(-100);
  place = asked.length - (prompt ? 1 : 0); // where the box is: the one before is a step away
}

function recall(step) {
  place = Math.min(asked.length, Math.max(0, place + step));
  $("prompt").value = asked[place] || "";
  const caret = step < 0 ? 0 : $("prompt").value.length; // where the same key goes on
  $("prompt").setSelectionRange(caret, caret);
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("prompt").addEventListener("keydown", (event) => {
  const box = event.target;
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!$("send").disabled) send();
  } else if (event.key === "ArrowUp" && box.selectionEnd === 0) recall(-1);
  else if (event.key === "ArrowDown" && box.selectionStart === box.value.length) recall(1);
});
$("pause").addEventListener("click", () => say({ type: paused ? "resume" : "pause" }));
$("stop").addEventListener("click", () => {
  say({ type: "stop" });
  state("stopping", "busy");
});
$("save").addEventListener("click", async () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await recording.file());
  link.download = "fps-live.mp4";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  if (recording.dropped) fail(`saved: the last ${bytes(recording.size)}; a page keeps no more`);
});
document.addEventListener("keydown", (event) => {
  if (event.code !== "Space" || event.target.closest("textarea, button, input, a") || $("pause").disabled) return;
  event.preventDefault();
  $("pause").click();
});
setInterval(() => {
  if (!player) return;
  $("time").textContent = clock(video.currentTime);
  $("ahead").textContent = player.ahead.toFixed(1);
  player.pump();
  if (running) say({ type: "buffered", seconds: player.ahead, blocks: player.blocks });
}, 250);

buttons();
connect();
