// Settings that are kept, the API key that is not, and light or dark.
import { byId, el, say } from "./dom.js";

const KEPT = "trimaran.settings";
const KEY = "trimaran.key"; // of the tab's session: gone when the tab is closed
const THEMES = ["system", "light", "dark"];
const FIELDS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, hint: "0 takes the likeliest token" },
  { name: "top_p", label: "Top p", min: 0, max: 1, hint: "of the probability, the likeliest share" },
  { name: "top_k", label: "Top k", min: 1, max: 1_000_000, isWhole: true, hint: "only the k likeliest tokens" },
  { name: "min_p", label: "Min p", min: 0, max: 1, hint: "of the likeliest token's probability" },
  { name: "max_tokens", label: "Most tokens", min: 1, max: 10_000_000, isWhole: true, hint: "of one answer" },
  { name: "seed", label: "Seed", min: 0, max: 2 ** 53 - 1, isWhole: true, hint: "the same answer again" },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, hint: "on tokens that were used" },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, hint: "on each use of a token" },
];

/** Return a sentence for a value that is not allowed, else "". */
function problemOf(field, value) {
  const isRight = Number.isFinite(value) && value >= field.min && value <= field.max;
  if (isRight && (!field.isWhole || Number.isInteger(value))) return "";
  return `${field.label} has to be ${field.isWhole ? "a whole number" : "a number"} from ${field.min} to ${field.max}.`;
}

/** What the user set: `values` by parameter name, where set; `system`, the prompt of new conversations; `theme`. */
export class Settings {
  constructor() {
    this.read();
  }

  read() {
    let kept = {};
    try {
      kept = JSON.parse(localStorage.getItem(KEPT)) ?? {};
    } catch {
      // no storage, or another program's text: as if nothing was set
    }
    const values = FIELDS.filter((field) => problemOf(field, kept.values?.[field.name]) === "");
    this.values = Object.fromEntries(values.map(({ name }) => [name, kept.values[name]]));
    this.system = typeof kept.system === "string" ? kept.system : "";
    this.theme = THEMES.includes(kept.theme) ? kept.theme : "system";
    this.model = typeof kept.model === "string" ? kept.model : "";
    document.documentElement.dataset.theme = this.theme;
  }

  /** Keep them; returns whether the browser does. */
  keep() {
    document.documentElement.dataset.theme = this.theme;
    const { values, system, theme, model } = this;
    try {
      localStorage.setItem(KEPT, JSON.stringify({ values, system, theme, model }));
      return true;
    } catch {
      return false;
    }
  }

  get key() {
    try {
      return sessionStorage.getItem(KEY) ?? "";
    } catch {
      return this.unkeptKey ?? "";
    }
  }

  set key(key) {
    this.unkeptKey = key;
    try {
      sessionStorage.setItem(KEY, key);
    } catch {
      // it stays with the page alone
    }
  }
}

function numberField(field, settings, keep) {
  const problem = el("p", { class: "problem", id: `problem-${field.name}` });
  const input = el("input", {
    type: "number", id: `set-${field.name}`, min: field.min, max: field.max, step: field.isWhole ? 1 : "any",
    inputmode: "decimal", placeholder: "as the server", "aria-describedby": `hint-${field.name} problem-${field.name}`,
  });
  input.value = settings.values[field.name] ?? "";
  input.addEventListener("input", () => {
    const isUnset = input.value === "" && !input.validity.badInput;
    problem.textContent = isUnset ? "" : problemOf(field, input.valueAsNumber);
    input.setAttribute("aria-invalid", String(problem.textContent !== ""));
    if (problem.textContent) return say(problem.textContent);
    if (isUnset) delete settings.values[field.name];
    else settings.values[field.name] = input.valueAsNumber;
    keep();
  });
  return el("div", { class: "field" },
    el("label", { for: input.id }, field.label),
    input, el("p", { class: "hint", id: `hint-${field.name}` }, field.hint), problem);
}

function themeChoice(settings, keep) {
  const choices = THEMES.map((theme) => {
    const input = el("input", { type: "radio", name: "theme", value: theme, checked: settings.theme === theme });
    input.addEventListener("change", () => {
      settings.theme = theme;
      keep();
    });
    return el("label", {}, input, theme[0].toUpperCase() + theme.slice(1));
  });
  return el("fieldset", { class: "themes" }, el("legend", {}, "Colours"), ...choices);
}

/** Show the dialog of settings; every valid value is kept at once. */
export function showSettings(settings) {
  const note = el("p", { class: "problem", role: "alert" });
  const keep = () => {
    note.textContent = settings.keep() ? "" : "This browser keeps no settings: they hold until the page is left.";
  };
  const system = el("textarea", { id: "set-system", rows: "3", placeholder: "none" });
  system.value = settings.system;
  system.addEventListener("input", () => {
    settings.system = system.value;
    keep();
  });
  byId("settings-fields").replaceChildren(
    themeChoice(settings, keep),
    el("div", { class: "field is-wide" },
      el("label", { for: "set-system" }, "System prompt of new conversations"), system),
    ...FIELDS.map((field) => numberField(field, settings, keep)), note);
  byId("settings").showModal();
}
