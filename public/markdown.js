// Markdown as models write it, to DOM nodes. There is no way from a text to markup: every node is made by createElement, text
// stays text (HTML in it is shown, not interpreted), links lead to http(s) and mailto only, and pictures become links.
//
// It understands headings, paragraphs, emphasis, code, fenced code, lists, task lists, quotes, tables, rules and links; a single
// line break stays one. All of it takes time linear in the text's length, or nearly so: the text may be anything.

import { copyButton, el } from './dom.js'

const DEEPEST = 8  // lists and quotes within one another, and emphasis within emphasis

// Shows a text in an element. Blocks that have not changed since the last time are left alone, so that a text that grows is
// cheap to show and what somebody has selected in it stays selected.
export function showMarkdown(element, text) {
  const found = blocks(text.split(/\r\n?|\n/), 0)
  found.forEach(({ source, build }, i) => {
    const old = element.childNodes[i]
    if (old?.source === source) return
    const node = build()
    node.source = source
    if (old) old.replaceWith(node)
    else element.append(node)
  })
  while (element.childNodes.length > found.length) element.lastChild.remove()
}

// ---- blocks -------------------------------------------------------------------------------------------------------------

const FENCE = /^ {0,3}(`{3,}(?!`)|~{3,}(?!~))([^`]*)$/
const HEADING = /^ {0,3}(#{1,6})(?= |$)/
const RULE = /^ {0,3}(?:(?:- *){3,}|(?:\* *){3,}|(?:_ *){3,})$/
const QUOTE = /^ {0,3}> ?/
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)/
const TABLE_RULE = /^ {0,3}\|?(?: *:?-+:? *\|)+(?: *:?-+:? *)?$|^ {0,3}\| *:?-+:? *$/

// The blocks of some lines: what each was made from, and how to make its node.
function blocks(lines, depth) {
  const found = []
  let at = 0
  while (at < lines.length) {
    if (lines[at].trim() === '') {
      at += 1
      continue
    }
    const { end, build } = blockAt(lines, at, depth)
    found.push({ source: lines.slice(at, end).join('\n'), build })
    at = end
  }
  return found
}

function blockAt(lines, at, depth) {
  const line = lines[at]
  const fence = FENCE.exec(line)
  if (fence) return codeAt(lines, at, fence)
  const heading = HEADING.exec(line)
  if (heading) return { end: at + 1, build: () => el(`h${heading[1].length}`, {}, inline(headingText(line, heading[0]))) }
  if (RULE.test(line)) return { end: at + 1, build: () => el('hr') }
  if (depth < DEEPEST && QUOTE.test(line)) return quoteAt(lines, at, depth)
  if (depth < DEEPEST && ITEM.test(line)) return listAt(lines, at, depth)
  if (isTable(lines, at)) return tableAt(lines, at)
  let end = at + 1
  while (end < lines.length && !interrupts(lines, end, depth)) end += 1
  return { end, build: () => el('p', {}, inline(lines.slice(at, end).map((text) => text.trim()).join('\n'))) }
}

// What a heading says: the marks that may end it, too, are no part of that.
function headingText(line, marks) {
  const text = line.slice(marks.length).trim()
  let end = text.length
  while (text[end - 1] === '#') end -= 1
  return end === 0 || text[end - 1] === ' ' ? text.slice(0, end).trimEnd() : text
}

// Whether a line ends the paragraph before it.
function interrupts(lines, at, depth) {
  const line = lines[at]
  return line.trim() === '' || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || isTable(lines, at) ||
    (depth < DEEPEST && (QUOTE.test(line) || ITEM.test(line)))
}

function codeAt(lines, at, [, fence, info]) {
  let end = at + 1
  const isEnd = (line) => {
    const text = line.trim()
    return text.length >= fence.length && text === fence[0].repeat(text.length)
  }
  while (end < lines.length && !isEnd(lines[end])) end += 1
  const indent = /^ */.exec(lines[at])[0].length
  const text = lines.slice(at + 1, end).map((line) => line.replace(new RegExp(`^ {0,${indent}}`), '')).join('\n')
  return { end: end + 1, build: () => codeBlock(text, info.trim().split(/\s/)[0]) }
}

function codeBlock(text, language) {
  return el('div', { class: 'code-block' },
    el('div', { class: 'code-head' }, el('span', {}, language || 'code'), copyButton(() => text, 'Copy code')),
    el('pre', { tabIndex: 0 }, el('code', {}, text)))
}

function quoteAt(lines, at, depth) {
  let end = at
  while (end < lines.length && QUOTE.test(lines[end])) end += 1
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ''))
  return { end, build: () => el('blockquote', {}, nodes(inner, depth + 1)) }
}

const nodes = (lines, depth) => blocks(lines, depth).map(({ build }) => build())

// A list goes on as long as lines are items of the same kind or belong to one: they are indented, or blank between such lines.
function listAt(lines, at, depth) {
  const [, indent, marker] = ITEM.exec(lines[at])
  const isOrdered = /\d/.test(marker)
  const items = []
  let isLoose = false
  let end = at
  while (end < lines.length) {
    const line = lines[end]
    const item = ITEM.exec(line)
    const isBlank = line.trim() === ''
    const width = /^ */.exec(line)[0].length
    if (item && width <= indent.length + 1 && !RULE.test(line)) {
      if (/\d/.test(item[2]) !== isOrdered) break
      items.push({ inner: item[0].length, lines: [line.slice(item[0].length)] })
    } else if (isBlank) {
      let next = end + 1
      while (next < lines.length && lines[next].trim() === '') next += 1
      if (next === lines.length || !(/^ {2,}/.test(lines[next]) || isItemOf(lines[next], isOrdered, indent.length))) break
      isLoose = true
      items.at(-1).lines.push('')
      end = next - 1
    } else if (width > indent.length || (lines[end - 1].trim() !== '' && !interrupts(lines, end, depth))) {
      const { inner, lines: own } = items.at(-1)
      own.push(line.slice(Math.min(width, inner)))
    } else break
    end += 1
  }
  const start = Number.parseInt(marker, 10)
  return {
    end,
    build: () => el(isOrdered ? 'ol' : 'ul', isOrdered && start !== 1 ? { start } : {},
      items.map(({ lines: own }) => listItem(own, depth, isLoose))),
  }
}

function isItemOf(line, isOrdered, indent) {
  const item = ITEM.exec(line)
  return item !== null && /\d/.test(item[2]) === isOrdered && item[1].length <= indent + 1
}

function listItem(lines, depth, isLoose) {
  const task = /^\[([ xX])\] +/.exec(lines[0])
  if (task) lines = [lines[0].slice(task[0].length), ...lines.slice(1)]
  let children = nodes(lines, depth + 1)
  if (!isLoose) children = children.flatMap((node) => (node.tagName === 'P' ? [...node.childNodes] : [node]))
  const box = task && el('input', { type: 'checkbox', checked: task[1] !== ' ', disabled: true })
  return el('li', task ? { class: 'task' } : {}, box, children)
}

function isTable(lines, at) {
  return lines[at].includes('|') && at + 1 < lines.length && lines[at + 1].includes('-') && TABLE_RULE.test(lines[at + 1]) &&
    cells(lines[at]).length === cells(lines[at + 1]).length
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, '').replace(/(?<!\\)\|$/, '')
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll('\\|', '|'))
}

function tableAt(lines, at) {
  let end = at + 2
  while (end < lines.length && lines[end].includes('|')) end += 1
  const sides = cells(lines[at + 1]).map((rule) => (rule.endsWith(':') ? (rule.startsWith(':') ? 'center' : 'right') : ''))
  const row = (tag, line) => el('tr', {},
    cells(line).slice(0, sides.length).map((cell, i) => el(tag, { class: sides[i] || undefined }, inline(cell))))
  return {
    end,
    build: () => el('div', { class: 'table', tabIndex: 0 }, el('table', {},
      el('thead', {}, row('th', lines[at])),
      el('tbody', {}, lines.slice(at + 2, end).map((line) => row('td', line))))),
  }
}

// ---- what is within a line ----------------------------------------------------------------------------------------------

const PUNCTUATION = /[\p{P}\p{S}]/u

// The nodes of a text. Emphasis is found as CommonMark does it: runs of * _ ~ are kept aside, and matched in the end.
function inline(text, isLabel = false) {
  const parts = []  // nodes, and runs { mark, n, opens, closes }
  const closing = isLabel ? new Map() : closingBrackets(text)  // there are no links in links
  const missing = new Set()  // lengths of runs of ` that no other one closes
  let plain = ''
  const push = (part) => {
    if (plain) parts.push(document.createTextNode(plain))
    plain = ''
    parts.push(part)
  }
  let at = 0
  while (at < text.length) {
    const character = text[at]
    if (character === '\\' && at + 1 < text.length && /[!-/:-@[-`{-~]/.test(text[at + 1])) {
      plain += text[at + 1]
      at += 2
    } else if (character === '\n') {
      plain = plain.trimEnd()
      push(el('br'))
      at += 1
    } else if (character === '`') {
      const run = /`+/y
      run.lastIndex = at
      const marks = run.exec(text)[0]
      const end = missing.has(marks.length) ? -1 : endOfCode(text, at + marks.length, marks.length)
      if (end < 0) {
        missing.add(marks.length)
        plain += marks
        at += marks.length
      } else {
        const code = text.slice(at + marks.length, end).replaceAll('\n', ' ')
        push(el('code', {}, /^ .* $/.test(code) && code.trim() ? code.slice(1, -1) : code))
        at = end + marks.length
      }
    } else if (character === '[' || (character === '!' && text[at + 1] === '[')) {
      const open = character === '[' ? at : at + 1
      const found = linkAt(text, open, closing)
      if (found) push(link(found.url, inline(found.label, true)))
      else plain += text.slice(at, open + 1)
      at = found ? found.end : open + 1
    } else if (!isLabel && (character === '<' || (character === 'h' && (at === 0 || !/\w/.test(text[at - 1]))))) {
      const bare = /<(https?:\/\/[^\s<>]+|mailto:[^\s<>]+)>|https?:\/\/[^\s<>]+/y
      bare.lastIndex = at
      const found = bare.exec(text)
      if (found) {
        const url = found[1] ?? trimmed(found[0])
        push(link(url, [document.createTextNode(url)]))
        at += found[1] ? found[0].length : url.length
      } else {
        plain += character
        at += 1
      }
    } else if (character === '*' || character === '_' || character === '~') {
      let end = at
      while (text[end] === character) end += 1
      push(run(text, at, end))
      at = end
    } else {
      plain += character
      at += 1
    }
  }
  if (plain) parts.push(document.createTextNode(plain))
  return emphasize(parts)
}

// Where a run of exactly n ` begins, or -1.
function endOfCode(text, from, n) {
  for (let at = text.indexOf('`', from); at >= 0;) {
    let end = at
    while (text[end] === '`') end += 1
    if (end - at === n) return at
    at = text.indexOf('`', end)
  }
  return -1
}

// For each [ the place of its ].
function closingBrackets(text) {
  const closing = new Map()
  const open = []
  for (let at = 0; at < text.length; at += 1) {
    if (text[at] === '\\') at += 1
    else if (text[at] === '[') open.push(at)
    else if (text[at] === ']' && open.length) closing.set(open.pop(), at)
  }
  return closing
}

function linkAt(text, open, closing) {
  const close = closing.get(open)
  if (close === undefined || text[close + 1] !== '(') return null
  const target = /\( *<?((?:[^\s()<>]|\([^\s()<>]*\))+)>?(?: +["'(][^"')\n]*["')])? *\)/y
  target.lastIndex = close + 1
  const found = target.exec(text)
  return found && { label: text.slice(open + 1, close), url: found[1], end: target.lastIndex }
}

// An address in running text ends before the punctuation after it, and before a parenthesis that opened outside.
function trimmed(url) {
  const after = url.includes('(') ? '.,:;!?\'"*_~]' : '.,:;!?\'"*_~])'
  let end = url.length
  while (after.includes(url[end - 1])) end -= 1
  return url.slice(0, end)
}

// A link, if it leads where links may lead; else its text.
function link(url, children) {
  if (!/^(https?:\/\/|mailto:)/i.test(url)) return el('span', {}, children)
  return el('a', { href: url, target: '_blank', rel: 'noopener noreferrer nofollow' }, children)
}

// A run of marks, and whether it can begin or end an emphasis: https://spec.commonmark.org/0.31.2/#left-flanking-delimiter-run
function run(text, start, end) {
  const before = text[start - 1] ?? ' '
  const after = text[end] ?? ' '
  const spaceBefore = /\s/.test(before), spaceAfter = /\s/.test(after)
  const markBefore = PUNCTUATION.test(before), markAfter = PUNCTUATION.test(after)
  const left = !spaceAfter && (!markAfter || spaceBefore || markBefore)
  const right = !spaceBefore && (!markBefore || spaceAfter || markAfter)
  const mark = text[start]
  const inWord = mark === '_'
  return {
    mark,
    n: end - start,
    opens: left && (!inWord || !right || markBefore),
    closes: right && (!inWord || !left || markAfter),
  }
}

// Puts what is between matching runs into elements; marks that match nothing become text.
function emphasize(parts) {
  const out = []
  const open = { '*': [], _: [], '~': [] }  // places in out of the runs that are open
  for (const part of parts) {
    if (part instanceof Node) {
      out.push(part)
      continue
    }
    const places = open[part.mark]
    while (part.closes && part.n > 0 && places.length) {
      const place = places.at(-1)
      const opener = out[place]
      const n = part.mark === '~' ? 2 : Math.min(2, opener.n, part.n)
      if (opener.n < n || part.n < n) break
      const inner = out.slice(place + 1)
      const level = 1 + inner.reduce((most, node) => Math.max(most, node.level ?? 0), 0)
      if (level > DEEPEST) {
        places.length = 0
        break
      }
      const tag = part.mark === '~' ? 'del' : n === 2 ? 'strong' : 'em'
      out.length = place + 1
      out.push(Object.assign(el(tag, {}, inner.map(asNode)), { level }))
      opener.n -= n
      part.n -= n
      for (const others of Object.values(open)) while (others.length && others.at(-1) > place) others.pop()
      if (opener.n === 0) {
        places.pop()
        out.splice(place, 1)
      }
    }
    if (part.n === 0) continue
    if (part.opens) places.push(out.length)
    out.push(part)
  }
  return out.map(asNode)
}

const asNode = (part) => (part instanceof Node ? part : document.createTextNode(part.mark.repeat(part.n)))
