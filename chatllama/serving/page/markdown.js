// Markdown of an answer as DOM nodes. Model output is a stranger's: every text becomes a text node,
// no HTML is parsed, and links lead to http, https and mailto only.

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.+?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}>\s?/;
const ITEM = /^ {0,3}(?:[-*+]|(\d{1,9})[.)])\s+/;
const INLINE = new RegExp([
  "(?<ticks>`+)(?<code>[^`]|[^`][^]*?[^`])\\k<ticks>(?!`)",
  "\\*\\*(?<bold>\\S|\\S[^]*?\\S)\\*\\*",
  "\\*(?<star>[^\\s*]|[^\\s*][^*]*?[^\\s*])\\*",
  "(?<![\\w_])_(?<low>[^\\s_]|[^\\s_][^_]*?[^\\s_])_(?![\\w_])",
  "\\[(?<label>[^\\[\\]]+)\\]\\((?<href>[^\\s()]+)\\)",
].join("|"), "g");
const DEEPEST = 8; // quotes and emphasis inside each other

// A fragment for a whole text.
export function markdown(text) {
  return blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0);
}

function blocks(lines, depth) {
  const made = document.createDocumentFragment();
  for (let i = 0; i < lines.length;) {
    const begin = i;
    const fence = FENCE.exec(lines[i]);
    const heading = HEADING.exec(lines[i]);
    if (!lines[i].trim()) i++;
    else if (fence) {
      const isEnd = (line) => line.trim().startsWith(fence[1]) && !line.trim().slice(3).match(/[^`~]/);
      for (i++; i < lines.length && !isEnd(lines[i]);) i++;
      made.append(codeBlock(lines.slice(begin + 1, i).join("\n"), fence[2]));
      i++;
    } else if (heading) {
      made.append(within(`h${Math.min(6, heading[1].length + 2)}`, inline(heading[2], depth)));
      i++;
    } else if (RULE.test(lines[i])) {
      made.append(document.createElement("hr"));
      i++;
    } else if (QUOTE.test(lines[i]) && depth < DEEPEST) {
      while (i < lines.length && QUOTE.test(lines[i])) i++;
      const inner = lines.slice(begin, i).map((line) => line.replace(QUOTE, ""));
      made.append(within("blockquote", blocks(inner, depth + 1)));
    } else if (ITEM.test(lines[i]) && depth < DEEPEST) {
      while (i < lines.length && (ITEM.test(lines[i]) || /^\s+\S/.test(lines[i]))) i++;
      made.append(list(lines.slice(begin, i), depth + 1));
    } else {
      i++;
      while (i < lines.length && lines[i].trim() && !opens(lines[i])) i++;
      made.append(within("p", inline(lines.slice(begin, i).join("\n"), depth)));
    }
  }
  return made;
}

const opens = (line) => [FENCE, HEADING, RULE, QUOTE, ITEM].some((kind) => kind.test(line));

const indent = (line) => line.search(/\S/);

function list(lines, depth) {
  const first = ITEM.exec(lines[0]);
  const made = document.createElement(first[1] ? "ol" : "ul");
  if (first[1] && Number(first[1]) !== 1) made.start = Number(first[1]);
  let item = [];
  const close = () => {
    if (!item.length) return;
    const nested = item.slice(1);
    const cut = Math.min(...nested.map(indent));
    const point = within("li", inline(item[0], depth));
    point.append(blocks(nested.map((line) => line.slice(cut)), depth));
    made.append(point);
  };
  const inner = indent(lines[0]) + 2; // from here on it is inside an item
  for (const line of lines) {
    if (ITEM.test(line) && indent(line) < inner) {
      close();
      item = [line.replace(ITEM, "")];
    } else item.push(line);
  }
  close();
  return made;
}

function inline(text, depth) {
  const made = document.createDocumentFragment();
  if (depth >= DEEPEST) {
    made.append(text);
    return made;
  }
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    made.append(text.slice(end, match.index));
    end = match.index + match[0].length;
    const { code, bold, star, low, label, href } = match.groups;
    if (code !== undefined) made.append(within("code", code));
    else if (bold !== undefined) made.append(within("strong", inline(bold, depth + 1)));
    else if (label !== undefined) made.append(link(label, href, match[0]));
    else made.append(within("em", inline(star ?? low, depth + 1)));
  }
  made.append(text.slice(end));
  return made;
}

function link(label, href, source) {
  if (!/^(https?:\/\/|mailto:)/i.test(href)) return source;
  const made = within("a", label);
  made.href = href;
  made.rel = "noopener noreferrer nofollow";
  made.target = "_blank";
  made.title = href;
  return made;
}

function codeBlock(text, language) {
  const made = within("pre", within("code", text));
  if (language) made.dataset.language = language;
  made.tabIndex = 0; // so that the keyboard can scroll it
  return made;
}

function within(tag, content) {
  const made = document.createElement(tag);
  made.append(content);
  return made;
}
