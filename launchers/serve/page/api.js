// The server's API: models, and answers as they arrive. Every failure becomes a sentence.
import { plural } from "./dom.js";

const SHOWN_WORKS = 5;

/** A failure that a user can read. `status` is 0 where no answer came; `code` is the server's word for it. */
export class ApiError extends Error {
  constructor(sentence, { status = 0, code = "" } = {}) {
    super(sentence);
    this.status = status;
    this.code = code;
  }
}

const LOST = "The connection to the server is lost. It may have ended; what came is kept.";

function headersOf(key) {
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

function asSentence(text) {
  const trimmed = String(text ?? "").trim();
  return !trimmed || /[.!?]$/.test(trimmed) ? trimmed : `${trimmed}.`;
}

/** Return the sentence for an answer that is none; `said` is the server's own message. */
function refusal(status, code, said, retryAfter) {
  const sentence = asSentence(said);
  if (status === 401 || status === 403) return `The server does not accept the API key. ${sentence}`;
  if (status === 429) {
    const wait = /^\d{1,5}$/.test(retryAfter ?? "") ? ` in ${plural(Number(retryAfter), "second")}` : " in a while";
    return `The server has as many requests as it takes. Try again${wait}.`;
  }
  if (code === "context_length_exceeded")
    return `The conversation is longer than the model can read. ${sentence} Shorten or edit an earlier message, ` +
      "start a new conversation, or ask for fewer tokens in Settings.";
  if (status === 413) return `The conversation has more bytes than the server takes. ${sentence}`;
  if (status === 503) return `The server takes no requests now. ${sentence}`;
  if (status >= 500) return `The server failed. ${sentence}`;
  return `The server refused the request. ${sentence || `Its answer had the status ${status}.`}`;
}

async function failureOf(response) {
  const body = await response.text().catch(() => "");
  let error = {};
  try {
    error = JSON.parse(body).error ?? {};
  } catch {
    // a proxy's page, say: the status alone tells
  }
  const code = typeof error.code === "string" ? error.code : "";
  const sentence = refusal(response.status, code, error.message, response.headers.get("retry-after"));
  return new ApiError(sentence.trim(), { status: response.status, code });
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", redirect: "error", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server can't be reached. It may have ended, or the network is down.");
  }
  if (!response.ok) throw await failureOf(response);
  return response;
}

/** Return the server's models: names, each with a sentence on whom it imitates, "" for nobody. */
export async function listModels(key) {
  const response = await request("v1/models", { headers: headersOf(key) });
  const answer = await response.json().catch(() => ({}));
  const models = (Array.isArray(answer.data) ? answer.data : []).filter((model) => typeof model?.id === "string");
  return new Map(models.map((model) => [model.id, imitation(model.twin)]));
}

/** Return what a reader must know of a twin: that it imitates, and from which works it answers. */
function imitation(twin) {
  if (typeof twin?.author !== "string") return "";
  const isOf = typeof twin.character === "string" ? `${twin.character}, as ${twin.author} wrote the part` : twin.author;
  const works = (Array.isArray(twin.works) ? twin.works : []).filter((work) => typeof work === "string");
  const more = works.length > SHOWN_WORKS ? ` and ${works.length - SHOWN_WORKS} more` : "";
  const from = works.length ? ` It answers from ${works.slice(0, SHOWN_WORKS).join("; ")}${more}.` : "";
  return `This model imitates ${isOf}: what it says was never said by anyone, unless it is quoted from a passage.${from}`;
}

/** Yield the data of server-sent events, whatever the line ends and wherever the pieces are cut. */
export async function* eventsOf(pieces) {
  const decoder = new TextDecoder();
  let waiting = "";
  let data = [];
  for await (const piece of pieces) {
    waiting += decoder.decode(piece, { stream: true });
    const lines = waiting.split(/\r\n|\n|\r(?!$)/); // "\r" at the end may be half of "\r\n"
    waiting = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      else if (line === "" && data.length) {
        yield data.join("\n");
        data = [];
      }
    }
  }
}

async function* piecesOf(body) {
  const reader = body.getReader(); // not every browser iterates over a stream
  try {
    for (let next = await reader.read(); !next.done; next = await reader.read()) yield next.value;
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Return the citations that can be shown: number, title, lines, passage, and whether the server has put it there. */
export function citationsOf(value) {
  if (!Array.isArray(value)) return [];
  const text = (part) => (typeof part === "string" || typeof part === "number" ? String(part) : "");
  return value
    .filter((each) => each && Number.isInteger(each.n) && each.n > 0 && each.n < 1000 && typeof each.text === "string")
    .map((each) => ({
      n: each.n,
      title: text(each.title),
      lines: Array.isArray(each.lines) ? [...new Set(each.lines.map(text))].join("–") : text(each.lines),
      text: each.text,
      is_attached: each.is_attached === true,
    }));
}

function partsOf(data) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new ApiError("The server sent what is no JSON in the middle of an answer; what came is kept.");
  }
  if (chunk.error)
    throw new ApiError(`The server failed in the middle of the answer. ${asSentence(chunk.error.message)}`);
  const choice = chunk.choices?.[0];
  const piece = choice?.delta?.content;
  return {
    text: typeof piece === "string" ? piece : "",
    finish: typeof choice?.finish_reason === "string" ? choice.finish_reason : null,
    usage: chunk.usage && Number.isInteger(chunk.usage.completion_tokens) ? chunk.usage : null,
    citations: citationsOf(chunk.trimaran?.citations),
    checked: typeof chunk.trimaran?.text === "string" ? chunk.trimaran.text : null,
  };
}

/**
 * Yield the parts of an answer, each with what is new: `{text, finish, usage, citations, checked}`. Aborting ends it.
 *
 * `checked` is the whole answer once more where the server has held it to its passages, which may change citations.
 */
export async function* streamAnswer(body, key, signal) {
  const options = { method: "POST", headers: headersOf(key), body: JSON.stringify(body), signal };
  const response = await request("v1/chat/completions", options);
  let isWhole = false;
  try {
    for await (const data of eventsOf(piecesOf(response.body))) {
      if (data === "[DONE]") {
        isWhole = true;
        break;
      }
      yield partsOf(data);
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError(LOST);
  }
  if (!isWhole) throw new ApiError(LOST);
}
