// The page's start: what its buttons and keys do.
import { byId, notify } from "./dom.js";
import { Chat } from "./chat.js";
import { exportAll, exportOne, importFile } from "./files.js";
import { Settings, showSettings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Store, storageProblem } from "./store.js";

function fitPrompt() {
  const prompt = byId("prompt");
  prompt.style.height = "auto"; // browsers without field-sizing
  prompt.style.height = `${Math.min(prompt.scrollHeight + 2, window.innerHeight * 0.4)}px`;
}

function sendPrompt(chat) {
  const prompt = byId("prompt");
  if (!chat.send(prompt.value)) return;
  prompt.value = "";
  fitPrompt();
}

function bindComposer(chat) {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    sendPrompt(chat);
    byId("prompt").focus();
  });
  byId("prompt").addEventListener("input", fitPrompt);
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // an input method's Enter picks a word
    event.preventDefault();
    sendPrompt(chat);
  });
  byId("stop").addEventListener("click", () => chat.stop());
  byId("system-text").addEventListener("input", (event) => chat.setSystem(event.target.value));
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (byId("key").value.trim()) chat.useKey(byId("key").value.trim());
  });
}

/** Let Escape close what is open, or else stop the answer; dialogs and menus see to themselves. */
function bindEscape(chat, sidebar) {
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open], :popover-open")) return;
    if (sidebar.isDrawerOpen) sidebar.close();
    else chat.stop();
  });
}

function bindMenus(chat, sidebar, settings) {
  const inMenu = (id, act) =>
    byId(id).addEventListener("click", () => {
      byId("menu").hidePopover();
      act();
    });
  inMenu("rename", () => chat.rename());
  inMenu("export-one", () => exportOne(chat.conversation));
  inMenu("delete", () => chat.remove());
  byId("new").addEventListener("click", () => {
    sidebar.close();
    chat.startNew();
  });
  byId("export-all").addEventListener("click", () => exportAll(chat.store));
  byId("import").addEventListener("click", () => byId("import-file").click());
  byId("import-file").addEventListener("change", async ({ target }) => {
    if (target.files.length) await importFile(chat.store, target.files[0]);
    target.value = "";
    sidebar.show();
  });
  byId("open-settings").addEventListener("click", () => showSettings(settings));
  byId("model").addEventListener("change", ({ target }) => {
    settings.model = target.value;
    settings.keep();
    byId("twin").textContent = chat.imitations.get(target.value) ?? "";
  });
  for (const dialog of document.querySelectorAll("dialog")) {
    for (const each of dialog.querySelectorAll("[data-close]"))
      each.addEventListener("click", () => dialog.close(each.dataset.close));
  }
  byId("question-field").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.isComposing) byId("question").close("yes");
  });
}

async function start() {
  const settings = new Settings();
  const store = await Store.open();
  const chat = new Chat(store, settings);
  const sidebar = new Sidebar(store, (id) => chat.select(id));
  chat.attach(sidebar);
  bindComposer(chat);
  bindMenus(chat, sidebar, settings);
  bindEscape(chat, sidebar);
  window.addEventListener("pagehide", () => chat.leave());
  window.addEventListener("storage", () => settings.read());
  if (store.problem) notify(store.problem, { isError: true });
  await store.takeLeft().catch((error) => notify(storageProblem(error), { isError: true }));
  await chat.reopen();
  await Promise.all([sidebar.show(), chat.loadModels()]);
  document.documentElement.dataset.ready = "";
}

start();
