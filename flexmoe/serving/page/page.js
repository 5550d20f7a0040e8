// The page of the server. Everything that comes from outside is written as text, never as HTML.
"use strict";

const POLL_MS = 2000;
const OPEN = new Set(["validating", "in_progress", "finalizing", "cancelling"]);
const WORDS = { in_progress: "running" };
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);
const page = { key: sessionStorage.getItem("flexmoe-key"), limit: 20, batches: [], left: {}, performance: null, chosen: null, told: new Map() };

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function drawn(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function headers(more = {}) {
  return page.key ? { authorization: `Bearer ${page.key}`, ...more } : more;
}

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  const response = await fetch(path, { ...options, headers: headers(options.headers) });
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    throw new Refused(response.status, body.error?.message ?? `the server answered ${response.status}`);
  }
  return response;
}

const read = async (path) => (await ask(path)).json();
const send = async (path, body) =>
  (await ask(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) })).json();

function tell(problem) {
  const place = byId("problem");
  const text = problem ? problem.message : "";
  if (place.textContent !== text) place.textContent = text;
  place.hidden = !text;
  const locked = problem instanceof Refused && problem.status === 401;
  if (locked || !problem) {
    byId("key-form").hidden = !locked;
    byId("content").hidden = locked;
  }
}

function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (count >= 1024 && at < units.length - 1) {
    count /= 1024;
    at += 1;
  }
  return `${count.toFixed(at && count < 100 ? 1 : 0)} ${units[at]}`;
}

const rate = (value) => (value === undefined || value === null ? "–" : value < 10 ? value.toFixed(2) : value.toFixed(0));
const percent = (share) => `${Math.round(100 * share)} %`;
const moment = (seconds) => (seconds ? new Date(1000 * seconds).toLocaleString() : null);
const word = (state) => WORDS[state] ?? state;

function setList(list, pairs) {
  const shown = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  list.replaceChildren(...shown.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
}

// Batches.

function rowOf(batch) {
  const row = element("tr");
  row.dataset.id = batch.id;
  for (const name of ["Batch", "State", "Rows", "Rate", "Time left", "Actions"]) row.append(element("td", null, { "data-name": name }));
  const open = element("button", null, { type: "button", class: "id" });
  open.addEventListener("click", () => choose(batch.id, true));
  row.cells[0].append(open);
  row.cells[1].append(element("span"));
  row.cells[2].append(element("progress", null, { max: "1" }), element("span"));
  row.cells[5].append(element("div", null, { class: "actions" }));
  return row;
}

// Rows that completed, on average since the batch began; null before that.
function rowsPerSecond(batch) {
  const ended = batch.completed_at ?? batch.cancelled_at ?? batch.expired_at ?? batch.failed_at;
  return batch.in_progress_at ? batch.request_counts.completed / Math.max(1, (ended ?? Date.now() / 1000) - batch.in_progress_at) : null;
}

function fill(row, batch) {
  const { total, completed, failed } = batch.request_counts;
  const done = completed + failed;
  const name = batch.metadata?.name;
  const [open, state] = [row.cells[0].firstChild, row.cells[1].firstChild];
  open.textContent = name ? `${name} (${batch.id})` : batch.id;
  open.setAttribute("aria-label", `Show batch ${open.textContent}`);
  state.className = `state ${batch.status}`;
  state.textContent = word(batch.status);
  const [bar, count] = row.cells[2].children;
  bar.value = total ? done / total : 0;
  bar.setAttribute("aria-label", `${done} of ${total} rows are done`);
  count.textContent = total ? `${done} of ${total}${failed ? `, ${failed} failed` : ""}` : "";
  const speed = rowsPerSecond(batch);
  row.cells[3].textContent = speed === null ? "" : `${rate(speed)} rows/s`;
  row.cells[4].textContent = OPEN.has(batch.status) ? duration(page.left[batch.id]?.seconds_left) : "";
  const signature = `${batch.status}|${Boolean(batch.output_file_id)}|${Boolean(batch.error_file_id)}`;
  if (row.dataset.signature !== signature) {
    row.dataset.signature = signature;
    actions(row.cells[5].firstChild, batch);
  }
}

function actions(place, batch) {
  const focused = place.contains(document.activeElement);
  const made = [];
  const so_far = OPEN.has(batch.status) ? " so far" : "";
  if (batch.output_file_id) made.push(button(`Output${so_far}`, `Download the output of ${batch.id}`, () => download(batch.output_file_id)));
  if (batch.error_file_id) made.push(button(`Errors${so_far}`, `Download the errors of ${batch.id}`, () => download(batch.error_file_id)));
  if (["validating", "in_progress"].includes(batch.status)) {
    const cancel = button("Cancel", `Cancel ${batch.id}`, () => askToCancel(batch.id));
    cancel.classList.add("danger");
    made.push(cancel);
  }
  place.replaceChildren(...made);
  if (focused) (made[0] ?? byId("batches")).focus();
}

function button(text, label, act) {
  const made = element("button", text, { type: "button", "aria-label": label });
  made.addEventListener("click", () => Promise.resolve(act()).catch(tell));
  return made;
}

function showBatches(listed) {
  const table = byId("batch-rows");
  const rows = new Map([...table.rows].map((row) => [row.dataset.id, row]));
  listed.data.forEach((batch, at) => {
    const row = rows.get(batch.id) ?? rowOf(batch);
    rows.delete(batch.id);
    fill(row, batch);
    if (table.rows[at] !== row) table.insertBefore(row, table.rows[at] ?? null);
    const before = page.told.get(batch.id);
    if (before && before !== batch.status) byId("uploaded").textContent = `Batch ${batch.id} is ${word(batch.status)}.`;
    page.told.set(batch.id, batch.status);
  });
  for (const row of rows.values()) row.remove();
  byId("no-batches").hidden = listed.data.length > 0;
  table.parentElement.hidden = listed.data.length === 0;
  byId("older").hidden = !listed.has_more || page.limit >= 100;
  page.batches = listed.data;
}

function choose(id, focus) {
  page.chosen = id;
  const batch = page.batches.find((each) => each.id === id);
  byId("detail").hidden = !batch;
  if (!batch) return;
  byId("detail-title").textContent = `Batch ${batch.id}`;
  const { total, completed, failed } = batch.request_counts;
  const began = batch.in_progress_at;
  const ended = batch.completed_at ?? batch.cancelled_at ?? batch.expired_at ?? batch.failed_at;
  const speed = rowsPerSecond(batch);
  setList(byId("facts"), [
    ["State", word(batch.status)],
    ["Model", batch.model],
    ["Endpoint", batch.endpoint],
    ["Rows", `${completed} completed, ${failed} failed, ${total} in all`],
    ["Rate", speed === null ? null : `${rate(speed)} rows per second on average`],
    ["Time left", OPEN.has(batch.status) ? duration(page.left[id]?.seconds_left) : null],
    ["Tokens", `${batch.usage.input_tokens} prompt, ${batch.usage.output_tokens} generated`],
    ["Priority", String(batch.priority)],
    ["Created", moment(batch.created_at)],
    ["Began", moment(began)],
    ["Ended", moment(ended)],
    ["Has to end by", OPEN.has(batch.status) ? moment(batch.expires_at) : null],
    ...Object.entries(batch.metadata ?? {}).map(([key, value]) => [`metadata: ${key}`, value]),
  ]);
  const faults = batch.errors?.data ?? [];
  byId("faults").hidden = faults.length === 0;
  byId("fault-rows").replaceChildren(
    ...faults.map((fault) => element("li", `${fault.line ? `line ${fault.line}: ` : ""}${fault.message} (${fault.code})`)),
  );
  if (page.performance) showBatchLanes(id, page.performance);
  if (focus) byId("detail-title").focus();
}

async function download(id) {
  const link = element("a", null, { download: `${id}.jsonl` });
  if (page.key) {
    link.href = URL.createObjectURL(await (await ask(`/v1/files/${id}/content`)).blob());
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  } else {
    link.href = `/v1/files/${id}/content`;
  }
  document.body.append(link);
  link.click();
  link.remove();
}

function askToCancel(id) {
  const dialog = byId("confirm");
  dialog.returnValue = "no";
  dialog.onclose = () => {
    if (dialog.returnValue === "yes") send(`/v1/batches/${id}/cancel`, {}).then(poll).catch(tell);
  };
  dialog.showModal();
}

// A new batch.

function upload(file) {
  const form = new FormData();
  form.append("purpose", "batch");
  form.append("file", file);
  const bar = byId("upload");
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", "/v1/files");
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => (bar.value = event.total ? event.loaded / event.total : 0);
    request.onerror = () => reject(new Error("the upload was cut off"));
    request.onload = () => {
      let body = {};
      try {
        body = JSON.parse(request.responseText);
      } catch {
        /* the status says enough */
      }
      if (request.status === 200) resolve(body);
      else reject(new Refused(request.status, body.error?.message ?? `the server answered ${request.status}`));
    };
    request.send(form);
  });
}

async function start(event) {
  event.preventDefault();
  const [file] = byId("file").files;
  const [bar, told, submit] = [byId("upload"), byId("uploaded"), event.target.querySelector("button")];
  bar.hidden = false;
  submit.disabled = true;
  told.textContent = "Uploading …";
  try {
    const kept = await upload(file);
    const batch = await send("/v1/batches", {
      input_file_id: kept.id,
      endpoint: byId("endpoint").value,
      completion_window: byId("window").value,
      priority: Number(byId("priority").value),
      metadata: { name: file.name.slice(0, 512) },
    });
    told.textContent = `Batch ${batch.id} was made.`;
    event.target.reset();
    await poll();
    choose(batch.id, true);
  } catch (problem) {
    told.textContent = "";
    tell(problem);
  } finally {
    bar.hidden = true;
    submit.disabled = false;
  }
}

// Again and again.

async function poll() {
  try {
    const [batches, performance, models, memory, experts] = await Promise.all(
      [`/v1/batches?limit=${page.limit}`, "/v1/stats/performance", "/v1/models", "/v1/stats/memory", "/v1/stats/experts"].map(read),
    );
    page.left = performance.batches;
    showBatches(batches);
    showEngine(performance);
    showModels(models);
    showMemory(memory);
    showExperts(experts.layers);
    page.performance = performance;
    if (page.chosen) choose(page.chosen, false);
    const open = batches.data.filter((batch) => OPEN.has(batch.status)).length;
    const text = `${open} ${open === 1 ? "batch is" : "batches are"} open; ${performance.loaded ?? "no model"} is ${performance.state === "idle" && !performance.loaded ? "loaded" : performance.state}`;
    if (byId("state").textContent !== text) byId("state").textContent = text;
    document.title = open ? `(${open}) FlexMoE batches` : "FlexMoE batches";
    tell(null);
  } catch (problem) {
    byId("state").textContent = problem instanceof Refused ? "the server refuses" : "the server cannot be reached";
    tell(problem instanceof Refused ? problem : new Error("The server cannot be reached; trying again."));
  }
}

async function pollForever() {
  if (!document.hidden) await poll();
  setTimeout(pollForever, POLL_MS);
}

byId("new-form").addEventListener("submit", start);
byId("close-detail").addEventListener("click", () => {
  const { chosen } = page;
  page.chosen = null;
  byId("detail").hidden = true;
  const row = [...byId("batch-rows").rows].find((each) => each.dataset.id === chosen);
  (row?.querySelector("button") ?? byId("batches")).focus();
});
byId("older").addEventListener("click", () => {
  page.limit = 100;
  poll();
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  page.key = byId("key").value;
  sessionStorage.setItem("flexmoe-key", page.key);
  byId("key").value = "";
  poll();
});
pollForever();
