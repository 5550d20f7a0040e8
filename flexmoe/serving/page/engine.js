// What the page shows of the engine and the models. It uses the helpers of page.js, which runs after it.
"use strict";

function path(values, most) {
  const step = 300 / Math.max(1, values.length - 1);
  return values.map((value, at) => `${at ? "L" : "M"}${(at * step).toFixed(1)} ${(88 - (86 * value) / most).toFixed(1)}`).join("");
}

// What a batch had of the engine: the samples in which it had rows in flight.
function showBatchLanes(id, performance) {
  const own = performance.history.filter((each) => each.batches[id] !== undefined);
  const rows = own.map((each) => each.batches[id]);
  const most = Math.max(1, ...rows);
  byId("batch-lanes-box").hidden = own.length === 0;
  byId("batch-rows-chart").replaceChildren(drawn("path", { class: "other", d: path(rows, most) }));
  const text = own.length ? `now ${rows.at(-1)} rows in flight (most ${most})` : "";
  byId("batch-rows-chart").setAttribute("aria-label", text);
  byId("batch-rows-legend").textContent = text;
  showLanes(byId("batch-lanes"), own, performance.model?.predicted);
}

function showSpeed(history) {
  const tokens = history.map((each) => each.generated_tokens_per_s + each.prompt_tokens_per_s);
  const rows = history.map((each) => each.rows_in_flight);
  const [mostTokens, mostRows] = [Math.max(1e-9, ...tokens), Math.max(1, ...rows)];
  const chart = byId("speed");
  if (!history.length) {
    chart.replaceChildren();
    byId("speed-legend").textContent = "";
    return;
  }
  chart.replaceChildren(drawn("path", { class: "first", d: path(tokens, mostTokens) }), drawn("path", { class: "other", d: path(rows, mostRows) }));
  const text = `now ${rate(tokens.at(-1))} tokens per second (most ${rate(mostTokens)}) and ${rows.at(-1)} rows in flight (most ${mostRows})`;
  chart.setAttribute("aria-label", text);
  byId("speed-legend").textContent = text;
}

function showLanes(place, history, predicted) {
  const last = history.at(-1)?.lanes ?? {};
  const names = [...new Set([...Object.keys(last), ...Object.keys(predicted?.lanes ?? {})])].sort();
  place.replaceChildren(
    ...names.map((name) => {
      const row = element("div", null, { class: "lane" });
      const expected = predicted?.lanes?.[name];
      const text = `${percent(last[name] ?? 0)}${expected === undefined ? "" : `, predicted ${percent(expected)}`}`;
      const chart = drawn("svg", { viewBox: "0 0 300 90", preserveAspectRatio: "none", role: "img", "aria-label": `lane ${name}: busy ${text}` });
      chart.append(drawn("path", { class: "first", d: path(history.map((each) => each.lanes[name] ?? 0), 1) }));
      if (expected !== undefined) chart.append(drawn("line", { class: "expected", x1: 0, x2: 300, y1: 88 - 86 * expected, y2: 88 - 86 * expected }));
      row.append(element("span", name), chart, element("span", text));
      return row;
    }),
  );
}

function showMemory(memory) {
  const tiers = Object.entries(memory.tiers).map(([tier, { planned_bytes, budget_bytes, items }]) => {
    const box = element("div", null, { class: "tier" });
    const budget = budget_bytes ?? planned_bytes;
    const bar = element("progress", null, { max: String(Math.max(1, budget)), "aria-label": `${tier} tier` });
    bar.value = planned_bytes;
    const parts = Object.entries(items).filter(([, size]) => size > 0).sort((a, b) => b[1] - a[1]);
    const of = budget_bytes ? ` of ${bytes(budget_bytes)}` : "";
    const text = `${bytes(planned_bytes)}${of}: ${parts.map(([name, size]) => `${name} ${bytes(size)}`).join(", ") || "nothing"}`;
    box.append(element("strong", tier), bar, element("span", text));
    return box;
  });
  byId("memory").replaceChildren(...tiers, element("p", `The process holds ${bytes(memory.process_bytes)}.`));
}

function showExperts(layers) {
  const chart = byId("experts");
  if (!layers.length) {
    chart.replaceChildren();
    byId("expert-summary").textContent = "No token has been routed yet.";
    return;
  }
  const experts = layers[0].counts.length;
  const size = 10;
  chart.setAttribute("viewBox", `0 0 ${experts * size} ${layers.length * size}`);
  chart.setAttribute("height", String(Math.min(480, layers.length * 14)));
  const cells = [];
  let [worst, where] = [0, layers[0].layer];
  layers.forEach(({ layer, counts }, y) => {
    const most = Math.max(1, ...counts);
    const mean = counts.reduce((sum, count) => sum + count, 0) / experts;
    if (mean && most / mean > worst) [worst, where] = [most / mean, layer];
    counts.forEach((count, x) => {
      const cell = drawn("rect", { x: x * size, y: y * size, width: size - 1, height: size - 1, "fill-opacity": (0.06 + (0.94 * count) / most).toFixed(3) });
      const title = drawn("title", {});
      title.textContent = `layer ${layer}, expert ${x}: ${count}`;
      cell.append(title);
      cells.push(cell);
    });
  });
  chart.replaceChildren(...cells);
  byId("expert-summary").textContent =
    `How often each expert was chosen: ${layers.length} layers (down) of ${experts} experts (across), darker is more. ` +
    `The most uneven is layer ${where}, where one expert was chosen ${worst.toFixed(1)} times as often as the mean.`;
}

function showAdvice(model) {
  const advice = model?.advice ?? [];
  byId("advice-title").hidden = !model;
  byId("advice").replaceChildren(...advice.map((each) => element("li", each)));
  byId("no-advice").textContent = !model || advice.length ? "" : model.advice ? noAdvice(model) : "The planner is working it out …";
}

function noAdvice(model) {
  return model.planned ? "The planner knows nothing that would help." : "The policy was given, so the planner was not asked.";
}

function showEngine(performance) {
  const { model, now } = performance;
  const machine = performance.machine;
  setList(byId("engine"), [
    ["State", performance.loaded ? `${performance.loaded}: ${performance.state}` : "no model is loaded"],
    ["Machine", `${machine.cores} cores, ${bytes(machine.memory_bytes)} of memory${machine.gpu ? `, ${machine.gpu}` : ""}`],
    ["Device", model ? `${model.device}, ${model.dtype}` : null],
    ["Rows at once", model ? `at most ${model.block_size}, each of at most ${model.largest_row_tokens} tokens` : null],
    ["Speed", now ? `${rate(now.generated_tokens_per_s)} generated and ${rate(now.prompt_tokens_per_s)} prompt tokens per second` : null],
    ["Predicted", model?.predicted ? `${rate(model.predicted.generated_tokens_per_s)} generated tokens per second` : null],
    ["Completions", `${performance.requests.running} running, ${performance.requests.waiting} waiting`],
    ["Last failure", performance.last_failure],
  ]);
  byId("bottleneck").textContent = model ? `Bottleneck: ${performance.bottleneck}.` : "";
  showAdvice(model);
  setList(byId("policy"), Object.entries(model?.policy ?? {}).map(([name, value]) => [name, value === null ? null : JSON.stringify(value)]));
  showSpeed(performance.history);
  showLanes(byId("lanes"), performance.history, model?.predicted);
}

function showModels(models) {
  const list = byId("models");
  const signature = JSON.stringify(models.data.map((model) => [model.id, model.state]));
  if (list.dataset.signature === signature) return;
  list.dataset.signature = signature;
  const focused = list.contains(document.activeElement);
  list.replaceChildren(
    ...models.data.map((model) => {
      const item = element("li");
      item.append(element("strong", model.id), element("span", `${model.state}; context of ${model.context_tokens} tokens`));
      if (model.state === "not loaded") item.append(button("Load", `Load ${model.id}`, () => send("/v1/models/switch", { model: model.id })));
      return item;
    }),
  );
  if (focused) (list.querySelector("button") ?? byId("batches")).focus();
}
