// Draws the page from its data: the chosen query at the left, its documents at the right. It goes on from text.js.

const data = JSON.parse(document.getElementById("content").textContent);
const total = data.queries[0].counts.reduce((sum, count) => sum + count, 0); // each query has a score of each document
const state = { query: 0, needle: "", listed: data.queries.map((_, place) => place), holders: new Set() };

function queryText(query) {
  return [query.prompt, query.completion, query.text].filter((part) => part !== null).join(" ");
}

function label(query) {
  return query.name === null ? `Q${query.number}` : query.name;
}

// ---- Documents

/** Makes the card of a document. */
function cardOf(card, context, tied) {
  const shown = data.documents[card.document];
  const name = make("bdi", {}, visible(shown.id === null ? `row ${whole(shown.row)}` : shown.id));
  const source = make("bdi", {}, visible(shown.where));
  const meta = make("p", { class: "meta" }, source);
  if (shown.id !== null) meta.append(` · row ${whole(shown.row)}`);
  if (card.wordRank !== null && data.wordRanksFrom) {
    meta.append(" · ", make("span", { class: "words" }, "words: ", make("b", {}, ordinal(card.wordRank))));
  }
  const article = make("article", { class: tied ? "card tied" : "card" },
    tied ? make("p", { class: "tie" }, "tie with the one above") : null,
    make("header", {},
      make("h3", {}, make("span", { class: "rank" }, whole(card.rank)), " ", name),
      scoreOf(card.score, context),
      meta),
    bodyOf(card, shown, context));
  return article;
}

function scoreOf(score, { say, largest }) {
  const share = largest ? (50 * Math.abs(score)) / largest : 0;
  const bar = make("span", { class: score < 0 ? "bar harms" : "bar helps" });
  bar.style.setProperty("width", `${share}%`);
  return make("div", { class: "score" },
    make("span", { class: "number" }, make("span", { class: "hidden" }, "score "), say(score)),
    make("span", { class: "track", "aria-hidden": "true" }, bar));
}

/** Makes the text of a card, with the button that unfolds it and the line that tells a token's part. */
function bodyOf(card, shown, { words, needle, deepest }) {
  const tokens = card.tokens || [];
  const say = formatter(tokens.map((token) => token[2]).concat(card.rest || 0));
  const marks = findNeedle(shown.text, needle);
  const spans = { tokens, words: findWords(shown.text, (word) => words.has(word)), marks, say, deepest };
  const fold = foldAt(shown.text);
  const text = make("div", { class: "text", dir: "auto" });
  const body = make("div", { class: "body" }, text);
  const write = (end) => {
    text.replaceChildren();
    paint(text, shown.text, end, spans);
    if (end < shown.text.length) text.append("…");
  };
  let folded = fold < shown.text.length && !(marks.length && marks[0][1] > fold);
  write(folded ? fold : shown.text.length);
  if (card.tokens) body.append(readout(card, text, say));
  if (fold < shown.text.length) {
    const title = () => (folded ? `more (${whole(shown.text.length - fold)} characters)` : "less");
    const button = make("button", { type: "button", class: "more", "aria-expanded": String(!folded) }, title());
    button.addEventListener("click", () => {
      folded = !folded;
      write(folded ? fold : shown.text.length);
      button.setAttribute("aria-expanded", String(!folded));
      button.textContent = title();
      if (folded) body.parentElement.scrollIntoView({ block: "nearest" });
    });
    body.append(button);
  }
  return body;
}

/** Lets pointers, touches and arrow keys ask for the part of a token. */
function readout(card, text, say) {
  const idle = card.rest === null ? "" : `Tokens without text, such as that of the end, add ${say(card.rest)}.`;
  const line = make("p", { class: "readout", "aria-live": "polite" }, idle);
  const tell = (token) => {
    for (const old of text.querySelectorAll(".told")) old.classList.remove("told");
    if (token) token.classList.add("told");
    line.replaceChildren(token ? `“${token.textContent.trim() || "space"}” adds ${token.title}` : idle);
  };
  text.tabIndex = 0;
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", "Text; arrow keys go through its tokens");
  text.addEventListener("pointerover", (event) => {
    const token = event.target.closest(".token");
    if (token) tell(token);
  });
  text.addEventListener("blur", () => tell(null));
  text.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const all = [...text.querySelectorAll(".token")];
    const told = all.findIndex((token) => token.classList.contains("told"));
    tell(all[told < 0 ? (step > 0 ? 0 : all.length - 1) : (told + step + all.length) % all.length]);
  });
  return line;
}

/** Makes the cards of one side, with those left out that lack what is searched for. */
function sectionOf(id, heading, cards, context) {
  const section = make("section", { "aria-labelledby": id }, make("h2", { id }, heading));
  if (!cards.length) section.append(make("p", { class: "none" }, "None is shown."));
  const filter = context.needle && context.cards.some((card) => state.holders.has(card.document));
  let above = null;
  let left = 0;
  for (const card of cards) {
    if (filter && !state.holders.has(card.document)) {
      above = null;
      left += 1;
      continue;
    }
    section.append(cardOf(card, context, above !== null && Math.abs(above.score - card.score) < data.tie));
    above = card;
  }
  if (left) section.append(make("p", { class: "none" }, `${several(left, "document", "documents")} without the words searched for.`));
  return section;
}

function legend(query) {
  const line = make("p", { class: "legend" });
  if ([...query.top, ...query.worst].some((card) => card.tokens)) {
    const sample = (kind, text) => {
      const span = make("span", { class: `token ${kind}` }, text);
      span.style.setProperty("--tint", "40%");
      return span;
    };
    line.append(sample("helps", "token that helps"), " ", sample("harms", "token that harms"), " (line above), by what is computed where " +
      "it is read: mostly the prediction of the token after it. Point at it, or focus its text and press ← →, for the number · ");
  }
  line.append(make("u", {}, "word"), " of the query");
  if (data.wordRanksFrom) line.append(` · words: rank by shared words alone (${data.wordRanksFrom}), of ${whole(total)}`);
  return line;
}

// ---- The query

/** Draws the scores of all documents; those shown have a tick below. */
function histogram(query, say) {
  const [width, height, base] = [320, 112, 74];
  const [low, high] = [query.edges[0], query.edges[query.edges.length - 1]];
  const x = (score) => 2 + ((width - 4) * (score - low)) / (high - low || 1);
  const most = Math.log1p(Math.max(...query.counts));
  const within = (cards, place) => cards.some((card) =>
    card.score >= query.edges[place] &&
    (card.score < query.edges[place + 1] || place === query.counts.length - 1));
  const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", class: "histogram" });
  const words = `Scores of all ${several(total, "document", "documents")}, from ${say(low)} to ${say(high)}. ` +
    `${whole(query.top.length)} most helpful and ${whole(query.worst.length)} most harmful are marked.`;
  picture.append(draw("title", {}, words));
  query.counts.forEach((count, place) => {
    if (!count) return;
    const tall = Math.max(2, (base - 8) * (Math.log1p(count) / most));
    const [left, right] = [x(query.edges[place]), x(query.edges[place + 1])];
    const kind = within(query.top, place) ? "helps" : within(query.worst, place) ? "harms" : "";
    const range = `${whole(count)} from ${say(query.edges[place])} to ${say(query.edges[place + 1])}`;
    picture.append(draw("rect", { class: kind, x: left, y: base - tall, width: Math.max(right - left - 0.8, 0.8),
      height: tall }, draw("title", {}, range)));
  });
  picture.append(draw("line", { x1: 0, x2: width, y1: base + 0.5, y2: base + 0.5 }));
  for (const [cards, kind] of [[query.worst, "harms"], [query.top, "helps"]]) {
    for (const card of cards) {
      picture.append(draw("line", { class: kind, x1: x(card.score), x2: x(card.score), y1: base + 3, y2: base + 10 }));
    }
  }
  const write = (at, y, anchor, kind, text) =>
    picture.append(draw("text", { x: at, y, "text-anchor": anchor, class: kind }, text));
  if (low < 0 && high > 0) {
    picture.append(draw("line", { class: "zero", x1: x(0), x2: x(0), y1: 2, y2: base }));
    if (x(0) > 70 && x(0) < width - 70) write(x(0), base + 23, "middle", "", "0");
  }
  write(0, base + 23, "start", "", say(low));
  write(width, base + 23, "end", "", say(high));
  if (query.worst.length) write(0, base + 36, "start", "harms", `worst ${whole(query.worst.length)}`);
  if (query.top.length) write(width, base + 36, "end", "helps", `top ${whole(query.top.length)}`);
  return make("figure", {}, picture,
    make("figcaption", {}, `scores of all ${several(total, "document", "documents")}; heights are logarithmic`));
}

function queryParts(query, needle) {
  const parts = [["prompt", query.prompt, "prompt"], ["completion, scored", query.completion, "scored"],
    ["text, scored", query.text, "scored"]].filter(([, text]) => text !== null);
  return parts.map(([title, whole, kind]) => {
    const text = whole.trim();
    const block = make("div", { class: `said ${kind}`, dir: "auto", tabindex: text.length > 400 ? "0" : null });
    paint(block, text, text.length, { marks: findNeedle(text, needle) });
    return make("div", {}, make("h3", { class: "tag" }, title), block);
  });
}

// ---- The page

const search = make("input", { type: "search", id: "search", autocomplete: "off", spellcheck: "false" });
const previous = make("button", { type: "button", "aria-label": "Previous query", title: "Previous query (←)" }, "‹");
const next = make("button", { type: "button", "aria-label": "Next query", title: "Next query (→)" }, "›");
const position = make("p", { class: "position", "aria-live": "polite" });
const unfold = make("button", { type: "button", class: "unfold", "aria-expanded": "false", "aria-controls": "panel" });
const said = make("div", { class: "query" });
const chart = make("div");
const found = make("p", { class: "found", "aria-live": "polite" });
const list = make("ul", { class: "list" });
const panel = make("div", { class: "panel", id: "panel" }, said, chart,
  make("div", { class: "search" }, make("label", { for: "search" }, "Search queries and documents"), search, found,
    data.queries.length > 1 ? list : null));
const side = make("aside", { "aria-label": "Query" },
  make("div", { class: "steps" }, previous, position, next, unfold), panel);
const documents = make("main", { id: "documents", tabindex: "-1" });
const root = document.getElementById("page");

/** Draws the chosen query and its documents. */
function show() {
  const query = data.queries[state.query];
  const cards = [...query.top, ...query.worst];
  const say = formatter([...cards.map((card) => card.score), query.edges[0], query.edges[query.edges.length - 1]]);
  const largest = cards.reduce((most, card) => Math.max(most, Math.abs(card.score)), 0);
  const words = contentWords(queryText(query));
  const parts = cards.flatMap((card) => card.tokens || []).map((token) => Math.abs(token[2]));
  const deepest = parts.reduce((most, part) => Math.max(most, part), 0);  // one scale for all documents of a query
  const context = { say, largest, deepest, words, needle: state.needle, cards };
  position.replaceChildren(make("b", {}, make("bdi", {}, visible(label(query)))),
    ` ${whole(state.query + 1)} of ${whole(data.queries.length)}`);
  unfold.replaceChildren(visible(queryText(query).slice(0, 200)));
  said.replaceChildren(...queryParts(query, state.needle));
  chart.replaceChildren(histogram(query, say));
  documents.replaceChildren(legend(query), sectionOf("helpful", "Most helpful", query.top, context));
  if (query.worst.length) documents.append(sectionOf("harmful", "Most harmful", query.worst, context));
  const place = state.listed.indexOf(state.query);
  previous.disabled = !neighbour(-1);
  next.disabled = !neighbour(1);
  document.title = visible(`${label(query)} · ${data.title}`);
  list.querySelectorAll("a").forEach((link, at) => {
    if (at === place) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  });
  const link = list.querySelector("[aria-current]");
  if (link) list.scrollTop = link.offsetTop - list.offsetTop - (list.clientHeight - link.clientHeight) / 2;
}

/** Finds the listed query before or after the chosen one. */
function neighbour(step) {
  const places = step < 0 ? [...state.listed].reverse() : state.listed;
  const place = places.find((one) => (one - state.query) * step > 0);
  return place === undefined ? null : data.queries[place];
}

function go(step) {
  const query = neighbour(step);
  if (query) location.hash = `q${query.number}`;
}

/** Lists the queries that hold what is searched for, in their text or in a document shown for them. */
function filter() {
  const holds = (text) => lowered(text).includes(state.needle);
  state.holders = new Set();
  if (state.needle) {
    data.documents.forEach((shown, place) => {
      if (holds(shown.text) || holds(shown.id || "") || holds(shown.where)) state.holders.add(place);
    });
  }
  const places = data.queries.map((_, place) => place);
  state.listed = places.filter((place) => {
    const query = data.queries[place];
    return !state.needle || holds(queryText(query)) || holds(label(query)) ||
      [...query.top, ...query.worst].some((card) => state.holders.has(card.document));
  });
  list.replaceChildren(...state.listed.map((place) => {
    const query = data.queries[place];
    return make("li", {}, make("a", { href: `#q${query.number}` },
      make("b", {}, make("bdi", {}, visible(label(query)))), " ", visible(queryText(query).slice(0, 160))));
  }));
  found.textContent = state.needle
    ? `${several(state.listed.length, "query", "queries")}, ${several(state.holders.size, "document", "documents")}`
    : "";
}

const lower = new Map();
function lowered(text) {
  if (!lower.has(text)) lower.set(text, text.toLowerCase());
  return lower.get(text);
}

/** Chooses the query that the address names. */
function follow() {
  const place = data.queries.findIndex((query) => location.hash === `#q${query.number}`);
  state.query = Math.max(place, 0);
  show();
}

/** Opens or closes the panel below the bar of a narrow window; a wide one always shows it. */
function open(wanted) {
  side.classList.toggle("open", wanted);
  unfold.setAttribute("aria-expanded", String(wanted));
}

let waiting = 0;
search.addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    state.needle = search.value.trim().toLowerCase();
    filter();
    show();
  }, 120);
});
previous.addEventListener("click", () => go(-1));
next.addEventListener("click", () => go(1));
unfold.addEventListener("click", () => open(!side.classList.contains("open")));
list.addEventListener("click", (event) => {
  if (event.target.closest("a")) open(false);
});
document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.target === search) {
    if (event.key === "Enter" && state.listed.length && !state.listed.includes(state.query)) {
      location.hash = `q${data.queries[state.listed[0]].number}`;
    }
    return;
  }
  if (event.key === "ArrowLeft") go(-1);
  else if (event.key === "ArrowRight") go(1);
  else if (event.key === "/") {
    event.preventDefault();
    open(true);
    search.focus();
  }
});
window.addEventListener("hashchange", () => {
  follow();
  if (documents.getBoundingClientRect().top < 0) documents.scrollIntoView();
});

if (data.queries.length < 2) side.classList.add("single");
root.append(side, documents);
root.hidden = false;
filter();
follow();
