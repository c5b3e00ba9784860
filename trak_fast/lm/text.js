"use strict";
// Tools of page.js: elements, numbers, and texts with colors, underlines and marks.

const FOLDED_LETTERS = 700;
const FOLDED_LINES = 12;
const STOP_WORDS = new Set((
  "a about after all also am an and any are as at be because been before being but by can could d did do does doing " +
  "don down for from had has have having he her here hers him his how i if in into is it its just ll m me more most " +
  "my no nor not now of off on once only or other our out over own re s same she should so some such t than that " +
  "the their them then there these they this those through to too under until up us ve very was we were what when " +
  "where which while who whom why will with would you your"
).split(" "));

// ---- Small tools

/** Makes an element; attributes that are null or false are left out, children are nodes or text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Makes an element of a drawing. */
function draw(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Shows control characters as their pictures and halves of pairs as �, one for one, so that places in the text stay. */
function visible(text) {
  return text.replace(/[\0-\x08\x0b-\x1f]/g, (letter) => String.fromCharCode(0x2400 + letter.charCodeAt(0)))
    .replace(/\p{Surrogate}/gu, "\ufffd");
}

const whole = (number) => number.toLocaleString("en-US");

function ordinal(number) {
  const [last, two] = [number % 10, number % 100];
  const ending = two > 10 && two < 14 ? "th" : ["th", "st", "nd", "rd"][last] || "th";
  return whole(number) + ending;
}

function several(count, one, many) {
  return `${whole(count)} ${count === 1 ? one : many}`;
}

/** Writes numbers with as many decimals as the largest of them needs for three digits. */
function formatter(numbers) {
  const largest = Math.max(...numbers.map(Math.abs));
  const decimals = largest ? 2 - Math.floor(Math.log10(largest)) : 2;
  return (number) => {
    const size = Math.abs(number);
    const far = decimals > 6 || decimals < -3;
    const digits = far ? size.toExponential(2) : size.toFixed(Math.max(decimals, 0));
    return (Number(digits) === 0 ? "" : number < 0 ? "−" : "+") + digits.replace("e-", "e−");
  };
}

// ---- Text with colors, underlines and marks

/** Finds words: start and end of each that `wanted` takes, in order. */
function findWords(text, wanted) {
  const found = [];
  for (const match of text.matchAll(/[\p{L}\p{N}]+/gu)) {
    if (wanted(match[0].toLowerCase())) found.push([match.index, match.index + match[0].length]);
  }
  return found;
}

function contentWords(text) {
  const words = new Set();
  findWords(text, (word) => {
    if (!STOP_WORDS.has(word) && !/^[a-z]$/.test(word)) words.add(word);
    return false;
  });
  return words;
}

function findNeedle(text, needle) {
  const found = [];
  if (!needle) return found;
  const lower = text.toLowerCase();
  if (lower.length !== text.length) return found; // a letter that changes its length: places would be off
  for (let at = lower.indexOf(needle); at >= 0; at = lower.indexOf(needle, at + needle.length)) {
    found.push([at, at + needle.length]);
  }
  return found;
}

/** Returns a function that tells, for rising places, the span they are in: its number, or -1. */
function finder(spans) {
  let next = 0;
  return (place) => {
    while (next < spans.length && spans[next][1] <= place) next += 1;
    return next < spans.length && spans[next][0] <= place ? next : -1;
  };
}

/** Appends text[0:end] to an element: tokens colored, words underlined, findings marked. */
function paint(element, text, end, { tokens = [], words = [], marks = [], say = String, deepest = 0 }) {
  const cuts = new Set([0, end]);
  for (const spans of [tokens, words, marks]) {
    for (const span of spans) if (span[0] < end) cuts.add(span[0]).add(Math.min(span[1], end));
  }
  const places = [...cuts].sort((one, other) => one - other);
  const [tokenAt, wordAt, markAt] = [finder(tokens), finder(words), finder(marks)];
  const largest = tokens.reduce((most, token) => Math.max(most, Math.abs(token[2])), deepest);
  let token = -1;
  let target = element;
  for (let cut = 0; cut + 1 < places.length; cut += 1) {
    const [from, to] = [places[cut], places[cut + 1]];
    const here = tokenAt(from);
    if (here !== token || here < 0) {
      target = here < 0 ? element : tokenSpan(tokens[here][2], largest, say);
      if (here >= 0) element.append(target);
      token = here;
    }
    let piece = document.createTextNode(visible(text.slice(from, to)));
    if (wordAt(from) >= 0) piece = make("u", {}, piece);
    if (markAt(from) >= 0) piece = make("mark", {}, piece);
    target.append(piece);
  }
}

function tokenSpan(part, largest, say) {
  const share = largest ? Math.abs(part) / largest : 0;
  const kind = part < 0 ? "harms" : "helps";
  const span = make("span", { class: share < 0.04 ? "token" : `token ${kind}`, title: say(part) });
  span.style.setProperty("--tint", `${Math.round(6 + 44 * share)}%`);
  return span;
}

/** Finds the end of a long text's beginning: after a word, at most some letters and lines; the text's end if short. */
function foldAt(text) {
  let end = Math.min(text.length, FOLDED_LETTERS);
  let line = -1;
  for (let count = 0; count < FOLDED_LINES; count += 1) {
    line = text.indexOf("\n", line + 1);
    if (line < 0) break;
  }
  if (line >= 0 && line <= end) return line;
  if (text.length - end < 80) return text.length; // no button for a few words
  const space = text.slice(0, end).search(/\s\S*$/);
  if (space > end - 60) end = space;
  const code = text.charCodeAt(end - 1);
  if (code >= 0xd800 && code < 0xdc00) end -= 1; // not between the halves of a pair
  return end;
}
