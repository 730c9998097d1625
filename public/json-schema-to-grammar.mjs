// JSON Schema to GBNF: a grammar whose texts are JSON that the schema validates.
//
//     import { schemaToGrammar } from "/json-schema-to-grammar.mjs";
//     const grammar = schemaToGrammar({ type: "object", properties: { age: { type: "integer", minimum: 0 } } });
//
// The server's own `response_format` does the same in Python (pyllama/gbnf.py, patterns.py and json_schema.py, where it
// is explained what is permitted and what is refused), to the same text; change both, or neither.
//
// Inside, a schema's integers are BigInts, other numbers Numbers, and its objects Maps.

const MAX_DEPTH = 100
const MAX_VALUES = 50_000
const MAX_SIZE = 300_000
const MAX_ALTERNATIVES = 1_000
const MAX_MEETINGS = 200_000
const MAX_STRING = 50_000
const MAX_PATTERNS = 6
const MAX_COUNT = 50_000
const MAX_COMBINATIONS = 4_000
const MAX_DIGITS = 16
const LARGEST = 10n ** 40n
const EXACT_DIGITS = 15
const MAX_STATES = 10_000
const MAX_STEPS = 500_000
const MAX_GROUP_DEPTH = 50

/** The schema is not one, or cannot be expressed as a grammar. The message begins with the place: a JSON pointer. */
export class SchemaError extends Error {
  name = 'SchemaError'
}

class PatternError extends Error {}

/**
 * A grammar of the JSON texts that a schema validates, or of most of them.
 *
 * @param {object|boolean|string} schema a JSON Schema, or its JSON, from which large integers are read exactly
 * @returns {string} GBNF
 * @throws {SchemaError}
 */
export function schemaToGrammar(schema) {
  return new Converter(plain(schema)).convert()
}

/** The same for programs that were written for llama.cpp's module of this name. */
export class SchemaConverter {
  #propertyOrder
  #grammar = ''

  /** @param {Object<string, number>} propertyOrder where properties stand among those of their object */
  constructor(propertyOrder = {}) {
    this.#propertyOrder = propertyOrder.prop_order ?? propertyOrder
  }

  /** References into the schema itself are followed later, others are refused. */
  async resolveRefs(schema) {
    return schema
  }

  /** Reads a schema; the name of its rule, which is `root` unless another is given. */
  visit(schema, name = '') {
    const converter = new Converter(inOrder(plain(schema), this.#propertyOrder), name || 'root')
    this.#grammar = converter.convert()
    return converter.start.name
  }

  /** The grammar of the last schema. */
  formatGrammar() {
    return this.#grammar
  }
}

function inOrder(value, order) {
  if (Array.isArray(value)) {
    return value.map((element) => inOrder(element, order))
  }
  if (!(value instanceof Map)) {
    return value
  }
  const copy = new Map([...value].map(([key, member]) => [key, inOrder(member, order)]))
  const properties = copy.get('properties')
  if (properties instanceof Map) {
    const place = (name) => (typeof order[name] === 'number' ? order[name] : Number.MAX_VALUE)
    copy.set('properties', new Map([...properties].sort(([a], [b]) => place(a) - place(b))))
  }
  return copy
}

// ---- expressions ------------------------------------------------------------------------------------------------------
// Ranges: sorted, closed ranges of code points that neither overlap nor touch; halves of surrogate pairs count for
// nothing. Two expressions are the same if their texts are.

const LAST_CODE_POINT = 0x10ffff
const LAST_BEFORE_SURROGATES = 0xd7ff
const FIRST_AFTER_SURROGATES = 0xe000

class Expression {
  constructor(kind, fields) {
    Object.assign(this, fields)
    this.kind = kind
  }

  get key() {
    this.cached ??= writtenExpression(this)
    return this.cached
  }
}

const Text = (value) => new Expression('text', { value })
const Chars = (ranges) => new Expression('chars', { ranges })
const Rule = (name) => new Expression('rule', { name })
/** Matches nothing, but only at the string's start, or at its end. Only patterns have these. */
const Anchor = (atEnd) => new Expression('anchor', { atEnd })
const EMPTY = new Expression('sequence', { parts: [] })
const NEVER = new Expression('choice', { parts: [] })
const START = Anchor(false)
const END = Anchor(true)

const isNever = (e) => e.kind === 'choice' && e.parts.length === 0
const isEmpty = (e) => e.kind === 'sequence' && e.parts.length === 0
const isAtom = (e) => e.kind === 'text' || e.kind === 'chars' || e.kind === 'rule'

const text = (value) => (value ? Text(value) : EMPTY)

function sequence(...parts) {
  const flat = []
  for (const part of parts) {
    for (const p of part.kind === 'sequence' ? part.parts : [part]) {
      const last = flat[flat.length - 1]
      if (isNever(p)) {
        return NEVER
      }
      if (p.kind === 'text' && last?.kind === 'text') {
        flat[flat.length - 1] = Text(last.value + p.value)
      } else {
        flat.push(p)
      }
    }
  }
  return flat.length === 1 ? flat[0] : new Expression('sequence', { parts: flat })
}

function choice(...parts) {
  const flat = new Map()
  for (const part of parts) {
    for (const p of part.kind === 'choice' ? part.parts : [part]) {
      if (!flat.has(p.key)) {
        flat.set(p.key, p)
      }
    }
  }
  const unique = [...flat.values()]
  return unique.length === 1 ? unique[0] : new Expression('choice', { parts: unique })
}

/** `low` to `high` times; high null: any number. */
function repeat(part, low, high) {
  if (high !== null && high < low) {
    return NEVER
  }
  if (isNever(part)) {
    return low > 0 ? NEVER : EMPTY
  }
  if (isEmpty(part) || high === 0) {
    return EMPTY
  }
  return low === 1 && high === 1 ? part : new Expression('repeat', { part, low, high })
}

const optional = (part) => repeat(part, 0, 1)

function merged(ranges) {
  const result = []
  const inSurrogates = (code) => code > LAST_BEFORE_SURROGATES && code < FIRST_AFTER_SURROGATES
  for (const [first, last] of [...ranges].sort((a, b) => a[0] - b[0] || a[1] - b[1])) {
    const low = inSurrogates(first) ? FIRST_AFTER_SURROGATES : first
    const high = inSurrogates(last) ? LAST_BEFORE_SURROGATES : last
    const previous = result[result.length - 1]
    if (high < low) {
      continue
    }
    if (
      previous &&
      (low <= previous[1] + 1 || (previous[1] === LAST_BEFORE_SURROGATES && low === FIRST_AFTER_SURROGATES))
    ) {
      previous[1] = Math.max(previous[1], high)
    } else {
      result.push([low, high])
    }
  }
  return result
}

function complement(ranges) {
  const others = []
  let start = 0
  for (const [low, high] of merged(ranges)) {
    others.push([start, low - 1])
    start = high + 1
  }
  others.push([start, LAST_CODE_POINT])
  return merged(others.filter(([low, high]) => low <= high))
}

const oneOf = (characters) => Chars(merged([...characters].map((c) => [c.codePointAt(0), c.codePointAt(0)])))

// ---- rules --------------------------------------------------------------------------------------------------------------

class Rules {
  bodies = new Map()
  size = 0
  #taken = new Set()
  #shared = new Map()

  reserve(hint) {
    const trimmed = (s) => s.replace(/^-+|-+$/g, '')
    const base = trimmed(trimmed(hint.replace(/[^A-Za-z0-9]+/gu, '-')).slice(0, 40)) || 'rule'
    let name = base
    for (let n = 2; this.#taken.has(name); n++) {
      name = `${base}-${n}`
    }
    this.#taken.add(name)
    return Rule(name)
  }

  define(rule, body) {
    this.bodies.set(rule.name, body)
    this.size += sizeOf(body)
  }

  share(hint, body) {
    if (isEmpty(body) || isNever(body) || isAtom(body)) {
      return body
    }
    if (!this.#shared.has(body.key)) {
      const rule = this.reserve(hint)
      this.#shared.set(body.key, rule)
      this.define(rule, body)
    }
    return this.#shared.get(body.key)
  }

  /** GBNF of the rules that `root` needs, itself first; null where it matches nothing. */
  text(root) {
    let bodies = this.#productive()
    if (!bodies.has(root.name)) {
      return null
    }
    const short = new Map([...bodies].filter(([, body]) => isEmpty(body) || isAtom(body)))
    bodies = new Map([...bodies].map(([name, body]) => [name, replaced(body, short)]))
    const lines = []
    const wanted = [root.name]
    const seen = new Set(wanted)
    while (wanted.length) {
      const name = wanted.pop()
      lines.push(`${name} ::= ${bodies.get(name).key}\n`)
      const fresh = [...new Set(rulesIn(bodies.get(name)))].filter((n) => !seen.has(n))
      fresh.forEach((n) => seen.add(n))
      wanted.push(...fresh.reverse())
    }
    return lines.join('')
  }

  #productive() {
    const users = new Map()
    for (const [name, body] of this.bodies) {
      for (const other of new Set(rulesIn(body))) {
        users.set(other, [...(users.get(other) ?? []), name])
      }
    }
    const found = new Set()
    const todo = [...this.bodies.keys()]
    while (todo.length) {
      const name = todo.pop()
      if (!found.has(name) && canMatch(this.bodies.get(name), found)) {
        found.add(name)
        todo.push(...(users.get(name) ?? []))
      }
    }
    const never = new Map([...this.bodies.keys()].filter((name) => !found.has(name)).map((name) => [name, NEVER]))
    return new Map(
      [...this.bodies].filter(([name]) => found.has(name)).map(([name, body]) => [name, replaced(body, never)]),
    )
  }
}

function sizeOf(e) {
  switch (e.kind) {
    case 'text':
      return Array.from(e.value).length
    case 'repeat':
      return sizeOf(e.part) + 2 * Math.max(e.low, e.high ?? 0)
    case 'sequence':
    case 'choice':
      return e.parts.reduce((sum, part) => sum + sizeOf(part), 1)
  }
  return 1
}

function rulesIn(e) {
  switch (e.kind) {
    case 'rule':
      return [e.name]
    case 'repeat':
      return rulesIn(e.part)
    case 'sequence':
    case 'choice':
      return e.parts.flatMap(rulesIn)
  }
  return []
}

function canMatch(e, found) {
  switch (e.kind) {
    case 'rule':
      return found.has(e.name)
    case 'repeat':
      return e.low === 0 || canMatch(e.part, found)
    case 'sequence':
      return e.parts.every((part) => canMatch(part, found))
    case 'choice':
      return e.parts.some((part) => canMatch(part, found))
  }
  return true
}

function replaced(e, by) {
  switch (e.kind) {
    case 'rule':
      while (e.kind === 'rule' && by.has(e.name)) {
        e = by.get(e.name)
      }
      return e
    case 'repeat':
      return repeat(replaced(e.part, by), e.low, e.high)
    case 'sequence':
      return sequence(...e.parts.map((part) => replaced(part, by)))
    case 'choice':
      return choice(...e.parts.map((part) => replaced(part, by)))
  }
  return e
}

// ---- text ---------------------------------------------------------------------------------------------------------------

const hex = (code, size) => code.toString(16).toUpperCase().padStart(size, '0')
const IN_TEXT = { '\\': '\\\\', '"': '\\"', '\n': '\\n', '\r': '\\r', '\t': '\\t' }

function writtenExpression(e) {
  switch (e.kind) {
    case 'text':
      return `"${e.value.replace(/["\\\x00-\x1f\x7f]/g, (c) => IN_TEXT[c] ?? `\\x${hex(c.charCodeAt(0), 2)}`)}"`
    case 'chars':
      return writtenClass(e.ranges)
    case 'rule':
      return e.name
    case 'anchor':
      return e.atEnd ? '$' : '^'
    case 'sequence':
      return e.parts.map(writtenPart).join(' ') || '""'
    case 'choice':
      return e.parts.map((part) => part.key).join(' | ')
  }
  const part = e.part.kind === 'repeat' ? `(${e.part.key})` : writtenPart(e.part)
  const { low, high } = e
  if (low === 0 && high === null) {
    return `${part}*`
  }
  if (low === 1 && high === null) {
    return `${part}+`
  }
  if (low === 0 && high === 1) {
    return `${part}?`
  }
  return `${part}{${low}${high === low ? '' : high === null ? ',' : `,${high}`}}`
}

const writtenPart = (e) => (e.kind === 'sequence' || e.kind === 'choice' ? `(${e.key})` : e.key)

function writtenClass(ranges) {
  const all = ranges.length === 1 && ranges[0][0] === 0
  const negated = ranges[ranges.length - 1][1] === LAST_CODE_POINT && !all
  return `[${negated ? '^' : ''}${(negated ? complement(ranges) : ranges).map(writtenRange).join('')}]`
}

function writtenRange([first, last]) {
  const low = writtenCharacter(first)
  const high = writtenCharacter(last)
  return first === last ? low : first + 1 === last ? low + high : `${low}-${high}`
}

function writtenCharacter(code) {
  const c = String.fromCodePoint(code)
  if ('\\"[]'.includes(c)) {
    return `\\${c}`
  }
  if (code >= 0x20 && code < 0x7f && c !== '^' && c !== '-') {
    return c
  }
  return code < 0x100 ? `\\x${hex(code, 2)}` : code < 0x10000 ? `\\u${hex(code, 4)}` : `\\U${hex(code, 8)}`
}

// ---- patterns: characters -----------------------------------------------------------------------------------------------

const DIGIT = [[0x30, 0x39]]
const WORD = merged([
  [0x30, 0x39],
  [0x41, 0x5a],
  [0x5f, 0x5f],
  [0x61, 0x7a],
])
const BLANK = merged([
  [9, 13],
  [0x20, 0x20],
  [0xa0, 0xa0],
  [0x1680, 0x1680],
  [0x2000, 0x200a],
  [0x2028, 0x2029],
  [0x202f, 0x202f],
  [0x205f, 0x205f],
  [0x3000, 0x3000],
])
const NEWLINE = [[0x0a, 0x0a]]
const LINE_END = merged([
  [0x0a, 0x0a],
  [0x0d, 0x0d],
  [0x2028, 0x2029],
])
const EMOJI = [0x1f300, 0x1faff]
const NOT_DIGIT = merged([[0, 0x2f], [0x3a, 0x65f], [0x3000, 0xa61f], [0xac00, 0xd7a3], EMOJI])
const NOT_WORD = merged([
  [0, 0x2f],
  [0x3a, 0x40],
  [0x5b, 0x5e],
  [0x60, 0x60],
  [0x7b, 0x7f],
  [0x2010, 0x2027],
  [0x2030, 0x205e],
  EMOJI,
])
const NOT_BLANK = complement([...BLANK, [0x1c, 0x1f], [0x85, 0x85], [0xfeff, 0xfeff]])
const CLASSES = { d: DIGIT, D: NOT_DIGIT, w: WORD, W: NOT_WORD, s: BLANK, S: NOT_BLANK }
const OPPOSITE = { d: 'D', D: 'd', w: 'W', W: 'w', s: 'S', S: 's' }
const CONTROLS = { t: 9, n: 10, v: 11, f: 12, r: 13 }
const ALL = complement([])

function holds(ranges, code) {
  let low = 0
  let high = ranges.length
  while (low < high) {
    const middle = (low + high) >> 1
    if (ranges[middle][1] < code) {
      low = middle + 1
    } else {
      high = middle
    }
  }
  return low < ranges.length && ranges[low][0] <= code
}

const sameRanges = (a, b) => a.length === b.length && a.every(([low, high], i) => low === b[i][0] && high === b[i][1])

// ---- patterns: reading --------------------------------------------------------------------------------------------------

/** Reads a pattern; `generously`: with all that anybody may hold to match. */
class PatternReader {
  constructor(source, generously = false) {
    this.characters = Array.from(source)
    this.generously = generously
    this.at = 0
    this.depth = 0
  }

  fail(message) {
    throw new PatternError(`${message} (at character ${this.at + 1})`)
  }

  peek(n = 1) {
    return this.characters.slice(this.at, this.at + n).join('')
  }

  take(wanted) {
    const found = this.peek(wanted.length) === wanted
    this.at += found ? wanted.length : 0
    return found
  }

  /** What a sticky regular expression finds here. */
  match(pattern, offset = 0) {
    return pattern.exec(this.characters.slice(this.at + offset, this.at + offset + 200).join(''))
  }

  read() {
    const result = this.alternatives()
    if (this.peek()) {
      this.fail("this ')' closes nothing")
    }
    return result
  }

  alternatives() {
    const parts = [this.terms()]
    while (this.take('|')) {
      parts.push(this.terms())
    }
    return choice(...parts)
  }

  terms() {
    const parts = []
    while (!['', '|', ')'].includes(this.peek())) {
      parts.push(this.quantified())
    }
    return sequence(...parts)
  }

  quantified() {
    const start = this.at
    const part = this.atom()
    let bounds
    if (this.take('*')) {
      bounds = [0, null]
    } else if (this.take('+')) {
      bounds = [1, null]
    } else if (this.take('?')) {
      bounds = [0, 1]
    } else if (this.peek() === '{') {
      bounds = this.bounds()
    } else {
      return part
    }
    if ('^$'.includes(this.characters[start])) {
      this.fail('an anchor cannot be repeated')
    }
    this.take('?') // whether it prefers few or many does not change what it matches
    return repeat(part, ...bounds)
  }

  bounds() {
    const match = this.match(/^\{([0-9]+)(,?)([0-9]*)\}/)
    if (!match) {
      this.fail("a '{' that begins no quantifier must be escaped")
    }
    const low = Number(match[1].slice(0, 9))
    const high = !match[2] ? low : match[3] ? Number(match[3].slice(0, 9)) : null
    if (Math.max(low, high ?? 0) > MAX_STATES) {
      this.fail('so many repetitions cannot be expressed')
    }
    if (high !== null && high < low) {
      this.fail('a quantifier ends before it begins')
    }
    this.at += match[0].length
    return [low, high]
  }

  atom() {
    if (this.take('(')) {
      return this.group()
    }
    if (this.take('[')) {
      return this.charClass()
    }
    if (this.take('.')) {
      return Chars(complement(this.generously ? NEWLINE : LINE_END))
    }
    if (this.take('^')) {
      return START
    }
    if (this.take('$')) {
      // which Python finds before a last newline, too
      return this.generously ? sequence(optional(Chars(NEWLINE)), END) : END
    }
    if (this.take('\\')) {
      return this.escape()
    }
    const c = this.peek()
    if ('*+?'.includes(c)) {
      this.fail(`nothing stands before '${c}' to be repeated`)
    }
    if (c === '{') {
      this.fail("a '{' that begins no quantifier must be escaped")
    }
    this.at += 1
    return this.character(c.codePointAt(0))
  }

  character(code) {
    const ranges = merged([[code, code]])
    if (!ranges.length) {
      this.fail('half of a surrogate pair is no character')
    }
    return Chars(ranges)
  }

  group() {
    if (this.peek() === '?' && !this.take('?:')) {
      for (const [start, name] of [
        ['?=', 'ahead'],
        ['?!', 'ahead'],
        ['?<=', 'behind'],
        ['?<!', 'behind'],
      ]) {
        if (this.peek(start.length) === start) {
          this.fail(`looking ${name}, (${start}…), cannot be expressed`)
        }
      }
      const match = this.match(/^\?<[A-Za-z_$][A-Za-z0-9_$]{0,99}>/)
      if (!match) {
        this.fail(`this kind of group, (${this.peek(2)}…), cannot be expressed`)
      }
      this.at += match[0].length
    }
    this.depth += 1
    if (this.depth > MAX_GROUP_DEPTH) {
      this.fail('groups are nested too deeply')
    }
    const result = this.alternatives()
    if (!this.take(')')) {
      this.fail("a '(' is never closed")
    }
    this.depth -= 1
    return result
  }

  escape() {
    const c = this.peek()
    if (c && 'dDwWsS'.includes(c)) {
      this.at += 1
      return Chars(this.generously ? complement(CLASSES[OPPOSITE[c]]) : CLASSES[c])
    }
    if (c === 'b' || c === 'B') {
      this.fail(`word boundaries, \\${c}, cannot be expressed`)
    }
    if (c && 'k123456789'.includes(c)) {
      this.fail(`back references, \\${c}, cannot be expressed`)
    }
    return this.character(this.escaped())
  }

  escaped() {
    const c = this.peek()
    if (!c) {
      this.fail("a '\\' stands at the end")
    }
    if (c === 'p' || c === 'P') {
      this.fail(`Unicode properties, \\${c}, cannot be expressed`)
    }
    if (c === 'x' || c === 'u') {
      return this.escapedHex(c)
    }
    this.at += 1
    if (c in CONTROLS) {
      return CONTROLS[c]
    }
    if (c === '0' && !/^[0-9]$/.test(this.peek())) {
      return 0
    }
    if (c === 'c' && /^[A-Za-z]$/.test(this.peek())) {
      this.at += 1
      return this.characters[this.at - 1].charCodeAt(0) % 32
    }
    if (/^[A-Za-z0-9]$/.test(c)) {
      this.at -= 1
      this.fail(`unknown escape \\${c}`)
    }
    return c.codePointAt(0)
  }

  escapedHex(kind) {
    const match = this.match(kind === 'x' ? /^x([0-9A-Fa-f]{2})/ : /^u(?:([0-9A-Fa-f]{4})|\{([0-9A-Fa-f]{1,8})\})/)
    if (!match) {
      this.fail(`\\${kind} wants hexadecimal digits`)
    }
    this.at += match[0].length
    const code = parseInt(match[1] ?? match[2], 16)
    if (code > LAST_CODE_POINT) {
      this.fail(`\\${kind} wants a code point`)
    }
    if (code >= 0xd800 && code < 0xdc00 && this.peek(2) === '\\u') {
      const low = this.match(/^u([0-9A-Fa-f]{4})/, 1)
      const half = low ? parseInt(low[1], 16) : 0
      if (half >= 0xdc00 && half < 0xe000) {
        this.at += 1 + low[0].length
        return 0x10000 + ((code - 0xd800) << 10) + half - 0xdc00
      }
    }
    return code
  }

  charClass() {
    const negated = this.take('^')
    const inside = []
    const perhaps = [] // what somebody may hold to be inside
    if (this.peek() === ']') {
      this.fail('an empty class cannot be expressed')
    }
    while (!this.take(']')) {
      const low = this.classMember(inside, perhaps)
      if (low === null) {
        continue
      }
      let high = low
      if (this.peek() === '-' && !['-', '-]'].includes(this.peek(2))) {
        this.at += 1
        high = this.classMember(inside, perhaps)
        if (high === null) {
          // [a-\d]: the dash stands for itself
          inside.push([low, low], [0x2d, 0x2d])
          continue
        }
        if (high < low) {
          this.fail('a range ends before it begins')
        }
      }
      inside.push([low, high])
    }
    const members = merged(negated === this.generously ? inside : [...inside, ...perhaps])
    const ranges = negated ? complement(members) : members
    if (!ranges.length) {
      this.fail('a class matches nothing')
    }
    return Chars(ranges)
  }

  classMember(inside, perhaps) {
    const c = this.peek()
    if (!c) {
      this.fail("a '[' is never closed")
    }
    this.at += 1
    if (c !== '\\') {
      return c.codePointAt(0)
    }
    const next = this.peek()
    if (next && 'dDwWsS'.includes(next)) {
      this.at += 1
      inside.push(...CLASSES[next])
      perhaps.push(...complement(CLASSES[OPPOSITE[next]]))
      return null
    }
    if (next === 'b') {
      this.at += 1
      return 8
    }
    return this.escaped()
  }
}

// ---- patterns: formats --------------------------------------------------------------------------------------------------

const formats = () => {
  const r = String.raw
  const year = r`(?:[1-9]\d{3}|0[1-9]\d\d|00[1-9]\d|000[1-9])`
  const leapYear = r`(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)`
  const date =
    r`(?:${year}-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1\d|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)` +
    r`|${leapYear}-02-29)`
  const time = r`(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,9})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)`
  const octet = r`(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)`
  const group = '[0-9A-Fa-f]{1,4}'
  const ipv6 = [
    `(?:${group}:){7}${group}`,
    `(?:${group}:){1,7}:`,
    ...[1, 2, 3, 4, 5, 6].map((n) => `(?:${group}:){1,${7 - n}}(?::${group}){1,${n}}`),
    `:(?:(?::${group}){1,7}|:)`,
  ].join('|')
  const label = '[A-Za-z0-9](?:[A-Za-z0-9-]{0,28}[A-Za-z0-9])?'
  const host = r`(?:${label}\.){0,5}[A-Za-z](?:[A-Za-z0-9-]{0,28}[A-Za-z0-9])?`
  const atext = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]"
  const email = r`${atext}{1,30}(?:\.${atext}{1,30})?@${host}`
  const unreserved = "A-Za-z0-9._~!$&'()*+,;=@-"
  const hexByte = '%[0-9A-Fa-f]{2}'
  const part = `(?:[${unreserved}]|${hexByte}){1,64}`
  const segment = `(?:[:${unreserved}]|${hexByte}){1,64}`
  const segments = `(?:/(?:${segment})?){0,8}`
  const query = r`(?:\?(?:[:/?${unreserved}]|${hexByte}){0,32})?(?:#(?:[:/?${unreserved}]|${hexByte}){0,32})?`
  const uri = `[A-Za-z][A-Za-z0-9+.-]{0,31}:(?://${host}(?::[0-9]{1,5})?${segments}|${segment}${segments})${query}`
  const uriReference = `${uri}|(?:${part}${segments}|/(?:${segment}${segments})?)?${query}`
  const pointer = '(?:/(?:[^/~]|~[01])*)*'
  const timed = r`T(?:\d{1,9}H(?:\d{1,9}M(?:\d{1,9}S)?)?|\d{1,9}M(?:\d{1,9}S)?|\d{1,9}S)`
  const days = r`(?:\d{1,9}D|\d{1,9}M(?:\d{1,9}D)?|\d{1,9}Y(?:\d{1,9}M(?:\d{1,9}D)?)?)`
  return new Map(
    Object.entries({
      date,
      time,
      'date-time': `${date}T${time}`,
      duration: r`P(?:${days}(?:${timed})?|${timed}|\d{1,9}W)`,
      email,
      'idn-email': email,
      hostname: host,
      ipv4: r`${octet}(?:\.${octet}){3}`,
      ipv6,
      uri,
      iri: uri,
      'uri-reference': uriReference,
      'iri-reference': uriReference,
      uuid: '[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}',
      'json-pointer': pointer,
      'relative-json-pointer': `(?:0|[1-9]{1,9})(?:#|${pointer})`,
    }),
  )
}
const FORMATS = formats()

const simplerFormats = () => {
  const r = String.raw
  const host = r`(?:[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*\.)*[A-Za-z]+(?:-[A-Za-z0-9]+)*`
  const uri = [
    r`https?://(?:[a-z0-9]{1,15}\.){1,3}[a-z]{2,6}(?:/[A-Za-z0-9._~-]{0,15}){0,2}`,
    r`[A-Za-z]+://${host}(?::[0-9]+)?(?:/[A-Za-z0-9._~-]*)*(?:\?[A-Za-z0-9=&._~-]*)?`,
  ]
  const email = [
    r`[A-Za-z0-9]{1,20}(?:[._+-][A-Za-z0-9]{1,20})?@(?:[A-Za-z0-9]{1,15}\.){1,2}[A-Za-z]{2,6}`,
    `[A-Za-z0-9]+(?:[._+-][A-Za-z0-9]+)*@${host}`,
  ]
  return new Map([
    ['email', email],
    ['idn-email', email],
    ['hostname', [r`(?:[a-z0-9]{1,9}\.){0,3}[a-z]{1,9}`]],
    ['uri', uri],
    ['iri', uri],
    ['uri-reference', uri],
    ['iri-reference', uri],
  ])
}
const SIMPLER_FORMATS = simplerFormats()
const UNKNOWN_LANGUAGES = ['regex', 'idn-hostname', 'uri-template']

// ---- patterns: languages ------------------------------------------------------------------------------------------------

class Language {
  /** `generous`: the same pattern with all that anybody may hold to match; `simpler`: patterns that find some of the strings
   * only, the last one in few states. */
  constructor(pattern, generous = pattern, simpler = []) {
    this.pattern = pattern
    this.generous = generous
    this.simpler = simpler
  }

  /** The whole, and parts of it that are simpler. */
  parts() {
    return [this, ...this.simpler.map((pattern) => new Language(pattern))]
  }

  /** All strings of which anybody may hold that they belong to it. */
  generously() {
    this.generousLanguage ??= new Language(this.generous)
    return this.generousLanguage
  }

  automaton() {
    this.cached ??= new Automaton(this.pattern)
    return this.cached
  }

  matches(string) {
    const automaton = this.automaton()
    let states = automaton.start
    for (const c of string) {
      states = automaton.step(states, c.codePointAt(0))
    }
    return automaton.accepts(states)
  }

  /** Fewest and most characters, where the pattern is anchored; otherwise 0 and null. */
  lengths() {
    const parts = alternativesOf(this.pattern).map(withoutAnchors)
    if (!parts.every((part) => part !== null && part[0] && part[2])) {
      return [0, null]
    }
    return lengthsOf(choice(...parts.map((part) => part[1])))
  }
}

const patternLanguage = (source) =>
  new Language(new PatternReader(source).read(), new PatternReader(source, true).read())
const formatLanguages = new Map()

function formatLanguage(name) {
  if (!formatLanguages.has(name)) {
    const read = (source) => sequence(START, new PatternReader(source).read(), END)
    const pattern = read(FORMATS.get(name))
    formatLanguages.set(name, new Language(pattern, pattern, (SIMPLER_FORMATS.get(name) ?? []).map(read)))
  }
  return formatLanguages.get(name)
}

function namesLanguage(names) {
  const spelled = (s) => sequence(...Array.from(s, (c) => Chars([[c.codePointAt(0), c.codePointAt(0)]])))
  return new Language(sequence(START, choice(...names.map(spelled)), END))
}

const alternativesOf = (pattern) => (pattern.kind === 'choice' ? pattern.parts : [pattern])

function withoutAnchors(pattern) {
  const parts = pattern.kind === 'sequence' ? pattern.parts : [pattern]
  const atStart = parts.length > 0 && parts[0] === START
  const atEnd = parts.length > (atStart ? 1 : 0) && parts[parts.length - 1] === END
  const between = sequence(...parts.slice(atStart ? 1 : 0, parts.length - (atEnd ? 1 : 0)))
  return hasAnchor(between) ? null : [atStart, between, atEnd]
}

function hasAnchor(pattern) {
  if (pattern.kind === 'repeat') {
    return hasAnchor(pattern.part)
  }
  return pattern.kind === 'anchor' || (pattern.parts ?? []).some(hasAnchor)
}

function lengthsOf(e) {
  if (e.kind === 'repeat') {
    const [low, high] = lengthsOf(e.part)
    return [low * e.low, high === null || e.high === null ? null : high * e.high]
  }
  if (e.kind !== 'sequence' && e.kind !== 'choice') {
    return [1, 1]
  }
  const lows = e.parts.map((part) => lengthsOf(part)[0])
  const highs = e.parts.map((part) => lengthsOf(part)[1])
  const unbounded = highs.includes(null)
  if (e.kind === 'choice') {
    return [Math.min(...lows), unbounded ? null : Math.max(...highs)]
  }
  const sum = (values) => values.reduce((a, b) => a + b, 0)
  return [sum(lows), unbounded ? null : sum(highs)]
}

// ---- patterns: automata -------------------------------------------------------------------------------------------------

const NO_CONDITION = 0
const AT_START = 1
const AT_END = 2

/** Looks for a pattern in a string. Sets of states are sorted lists of 2 * state, plus 1 once the string must have ended. */
class Automaton {
  moves = []
  jumps = []

  constructor(pattern) {
    const before = this.state()
    this.final = this.state()
    this.moves[before].push([ALL, before])
    this.moves[this.final].push([ALL, this.final])
    this.add(pattern, before, this.final)
    this.useful = this.findUseful()
    this.start = this.closure([2 * before], true)
  }

  state() {
    if (this.moves.length >= MAX_STATES) {
      throw new PatternError('it needs too large an automaton')
    }
    this.moves.push([])
    this.jumps.push([])
    return this.moves.length - 1
  }

  add(pattern, entry, exit) {
    switch (pattern.kind) {
      case 'anchor':
        this.jumps[entry].push([pattern.atEnd ? AT_END : AT_START, exit])
        break
      case 'chars':
        this.moves[entry].push([pattern.ranges, exit])
        break
      case 'choice':
        pattern.parts.forEach((part) => this.add(part, entry, exit))
        break
      case 'sequence':
        for (const part of pattern.parts) {
          const following = this.state()
          this.add(part, entry, following)
          entry = following
        }
        this.jumps[entry].push([NO_CONDITION, exit])
        break
      case 'repeat':
        this.addRepeat(pattern, entry, exit)
    }
  }

  addRepeat({ part, low, high }, entry, exit) {
    const once = () => {
      const following = this.state()
      this.add(part, entry, following)
      entry = following
    }
    for (let i = 0; i < low; i++) {
      once()
    }
    if (high === null) {
      const loop = this.state()
      this.jumps[entry].push([NO_CONDITION, loop])
      this.add(part, loop, loop)
      this.jumps[loop].push([NO_CONDITION, exit])
      return
    }
    for (let i = low; i < high; i++) {
      this.jumps[entry].push([NO_CONDITION, exit])
      once()
    }
    this.jumps[entry].push([NO_CONDITION, exit])
  }

  /** States from which the pattern can still be found, the string's start being past. */
  findUseful() {
    const sources = this.moves.map(() => [])
    this.moves.forEach((moves, state) => moves.forEach(([, target]) => sources[target].push(state)))
    this.jumps.forEach((jumps, state) =>
      jumps.filter(([condition]) => condition !== AT_START).forEach(([, target]) => sources[target].push(state)),
    )
    const found = new Set([this.final])
    for (const state of found) {
      sources[state].forEach((source) => found.add(source))
    }
    return found
  }

  closure(states, atStart = false) {
    const found = new Set(states)
    const todo = [...states]
    while (todo.length) {
      const state = todo.pop()
      for (const [condition, target] of this.jumps[state >> 1]) {
        const reached = 2 * target + (condition === AT_END ? 1 : state & 1)
        if ((condition !== AT_START || atStart) && !found.has(reached)) {
          found.add(reached)
          todo.push(reached)
        }
      }
    }
    if (found.has(2 * this.final)) {
      return [2 * this.final]
    }
    const canGoOn = (s) => (s & 1 ? s >> 1 === this.final : this.useful.has(s >> 1))
    return [...found].filter(canGoOn).sort((a, b) => a - b)
  }

  step(states, code) {
    const reached = new Set()
    for (const state of states) {
      for (const [ranges, target] of state & 1 ? [] : this.moves[state >> 1]) {
        if (holds(ranges, code)) {
          reached.add(2 * target)
        }
      }
    }
    return this.closure([...reached])
  }

  accepts(states) {
    return states.some((state) => state >> 1 === this.final)
  }
}

/** All characters, in sets that none of the automata tells apart. */
class Alphabet {
  steps = 0

  constructor(automata) {
    this.automata = automata
    this.rows = automata.map(() => new Map())
    const sets = new Map()
    for (const [ranges] of automata.flatMap((a) => a.moves.flat())) {
      sets.set(String(ranges), ranges)
    }
    const unique = [...sets.values()]
    const bounds = new Set([0, LAST_CODE_POINT + 1])
    unique.flat().forEach(([low, high]) => bounds.add(low).add(high + 1))
    const sorted = [...bounds].sort((a, b) => a - b)
    if (unique.length * sorted.length > MAX_STEPS) {
      throw new PatternError('it tells too many characters apart')
    }
    const kinds = new Map()
    for (let i = 0; i + 1 < sorted.length; i++) {
      const key = unique.map((ranges) => (holds(ranges, sorted[i]) ? '1' : '0')).join('')
      kinds.set(key, [...(kinds.get(key) ?? []), [sorted[i], sorted[i + 1] - 1]])
    }
    this.kinds = [...kinds.values()].map(merged).filter((ranges) => ranges.length)
  }

  /** Where each kind of characters leads in automaton i. */
  after(i, states) {
    const key = states.join()
    if (!this.rows[i].has(key)) {
      this.steps += this.kinds.length
      if (this.steps > MAX_STEPS) {
        throw new PatternError('it needs too large an automaton')
      }
      this.rows[i].set(
        key,
        this.kinds.map((kind) => this.automata[i].step(states, kind[0][0])),
      )
    }
    return this.rows[i].get(key)
  }
}

// ---- patterns: writing --------------------------------------------------------------------------------------------------

const every = (accepted) => accepted.every(Boolean)

/** The inside of JSON strings that belong to all languages, or to those that are wanted, and have low..high characters. */
function written(rules, hint, languages, low, high, anyCharacter, wanted = every) {
  if (wanted === every) {
    if (!languages.length) {
      return repeat(anyCharacter, low, high)
    }
    for (const language of languages.length === 1 ? languages[0].parts() : []) {
      const [shortest, longest] = language.lengths()
      if (low <= shortest && (high === null || (longest !== null && longest <= high))) {
        const direct = writtenDirectly(language.pattern, anyCharacter)
        if (direct !== null) {
          return direct
        }
      }
    }
  }
  const simple = languages.map((language) => language.parts().at(-1))
  return new Product(simple, low, high, wanted).write(rules, hint, anyCharacter)
}

function writtenDirectly(pattern, anyCharacter) {
  const anything = repeat(anyCharacter, 0, null)
  const parts = alternativesOf(pattern).map(withoutAnchors)
  if (parts.includes(null)) {
    return null
  }
  return choice(
    ...parts.map(([atStart, between, atEnd]) =>
      sequence(atStart ? EMPTY : anything, encoded(between), atEnd ? EMPTY : anything),
    ),
  )
}

/** From characters to their JSON. */
function encoded(e) {
  switch (e.kind) {
    case 'repeat':
      return repeat(encoded(e.part), e.low, e.high)
    case 'sequence':
      return sequence(...e.parts.map(encoded))
    case 'choice':
      return choice(...e.parts.map(encoded))
  }
  return encodedCharacters(e.ranges)
}

const SHORT_ESCAPES = new Map([
  [0x08, 'b'],
  [0x09, 't'],
  [0x0a, 'n'],
  [0x0c, 'f'],
  [0x0d, 'r'],
  [0x22, '"'],
  [0x5c, '\\'],
])
const MUST_BE_ESCAPED = merged([
  [0, 0x1f],
  [0x22, 0x22],
  [0x5c, 0x5c],
])

function encodedCharacters(ranges) {
  const plainOnes = complement([...complement(ranges), ...MUST_BE_ESCAPED])
  const escaped = []
  for (const [low, high] of MUST_BE_ESCAPED) {
    for (let code = low; code <= high; code++) {
      if (holds(ranges, code)) {
        escaped.push(code)
      }
    }
  }
  const oneOfCodes = (codes) =>
    codes.length === 1 ? text(String.fromCodePoint(codes[0])) : oneOf(codes.map((c) => String.fromCodePoint(c)))
  const short = escaped.filter((code) => SHORT_ESCAPES.has(code)).map((code) => SHORT_ESCAPES.get(code).charCodeAt(0))
  const letters = short.length ? [oneOfCodes(short)] : []
  for (const sixteen of [0, 1]) {
    const digits = escaped
      .filter((code) => code >> 4 === sixteen && !SHORT_ESCAPES.has(code))
      .map((code) => (code % 16).toString(16).charCodeAt(0))
    if (digits.length) {
      letters.push(sequence(text(`u00${sixteen}`), oneOfCodes(digits)))
    }
  }
  const isSingle = plainOnes.length === 1 && plainOnes[0][0] === plainOnes[0][1]
  const parts = !plainOnes.length ? [] : isSingle ? [oneOfCodes([plainOnes[0][0]])] : [Chars(plainOnes)]
  return choice(...parts, ...(letters.length ? [sequence(text('\\'), choice(...letters))] : []))
}

/** A deterministic automaton that follows all languages, and counts characters as far as that matters. */
class Product {
  accepting = []
  targets = []

  constructor(languages, low, high, wanted) {
    const automata = languages.map((language) => language.automaton())
    const alphabet = new Alphabet(automata)
    const states = [[automata.map((a) => a.start), 0]]
    const numbers = new Map([[JSON.stringify(states[0]), 0]])
    for (const [sets, count] of states) {
      this.accepting.push(count >= low && wanted(automata.map((a, i) => a.accepts(sets[i]))))
      const targets = new Map()
      this.targets.push(targets)
      if (count === high) {
        continue
      }
      const following = high !== null || count < low ? count + 1 : count
      const rows = sets.map((states, i) => alphabet.after(i, states))
      for (const [k, kind] of alphabet.kinds.entries()) {
        const after = rows.map((row) => row[k])
        if (wanted === every && after.some((set) => !set.length)) {
          continue
        }
        const key = JSON.stringify([after, following])
        if (!numbers.has(key)) {
          if (states.length >= MAX_STATES) {
            throw new PatternError('it needs too large an automaton')
          }
          numbers.set(key, states.length)
          states.push([after, following])
        }
        const target = numbers.get(key)
        targets.set(target, [...(targets.get(target) ?? []), ...kind])
      }
    }
  }

  write(rules, hint, anyCharacter) {
    const alive = this.alive()
    const names = new Map()
    for (let state = 0; state < this.targets.length; state++) {
      if (alive.has(state)) {
        names.set(state, rules.reserve(hint))
      }
    }
    for (const [state, rule] of names) {
      const targets = [...this.targets[state]]
        .filter(([target]) => alive.has(target))
        .map(([t, ranges]) => [t, merged(ranges)])
      if (targets.length === 1 && targets[0][0] === state && sameRanges(targets[0][1], ALL) && this.accepting[state]) {
        rules.define(rule, repeat(anyCharacter, 0, null))
        continue
      }
      const parts = targets.map(([target, ranges]) =>
        sequence(sameRanges(ranges, ALL) ? anyCharacter : encodedCharacters(ranges), names.get(target)),
      )
      rules.define(rule, choice(...parts, ...(this.accepting[state] ? [EMPTY] : [])))
    }
    return names.get(0) ?? NEVER
  }

  alive() {
    const sources = this.targets.map(() => [])
    this.targets.forEach((targets, state) => {
      for (const target of targets.keys()) {
        sources[target].push(state)
      }
    })
    const alive = new Set()
    const todo = this.accepting.flatMap((accepting, state) => (accepting ? [state] : []))
    while (todo.length) {
      const state = todo.pop()
      if (!alive.has(state)) {
        alive.add(state)
        todo.push(...sources[state])
      }
    }
    return alive
  }
}

// ---- values -------------------------------------------------------------------------------------------------------------

function fail(pointer, message) {
  throw new SchemaError(`${pointer}: ${message}`)
}

/** Reads JSON with integers that are too large for Numbers as BigInts. */
function parseJson(source) {
  const mark = '\u0000integer '
  const marked = source.replace(/"(?:[^"\\]|\\.)*"|-?\d{16,}(?![\d.eE])/gs, (token) =>
    token[0] === '"' ? token : JSON.stringify(mark + token),
  )
  JSON.parse(source) // whose message is about what the user wrote
  return JSON.parse(marked, (_, value) =>
    typeof value === 'string' && value.startsWith(mark) ? BigInt(value.slice(mark.length)) : value,
  )
}

function plain(schema) {
  let n = 0

  function copied(value, pointer, depth) {
    n += 1
    if (n > MAX_VALUES) {
      fail('#', `the schema is too large: at most ${MAX_VALUES} values are read`)
    }
    if (depth > MAX_DEPTH) {
      fail('#', `the schema is nested too deeply: at most ${MAX_DEPTH} levels are read`)
    }
    if (value === null || ['boolean', 'bigint'].includes(typeof value)) {
      return value
    }
    if (typeof value === 'string') {
      if (value.length > MAX_STRING && characterCount(value) > MAX_STRING) {
        fail(pointer, `a string is too long: at most ${MAX_STRING} characters are read`)
      }
      return value
    }
    if (typeof value === 'number') {
      if (!Number.isFinite(value)) {
        fail(pointer, 'a number is not finite')
      }
      return Number.isInteger(value) ? BigInt(value) : value
    }
    if (Array.isArray(value)) {
      return value.map((element, i) => copied(element, `${pointer}/${i}`, depth + 1))
    }
    if (typeof value === 'object') {
      return new Map(
        Object.entries(value).map(([key, member]) => [
          copied(key, pointer, depth),
          copied(member, below(pointer, key), depth + 1),
        ]),
      )
    }
    return fail(pointer, `this is no JSON: ${typeof value}`)
  }

  return copied(typeof schema === 'string' ? parseJson(schema) : schema, '#', 0)
}

const below = (pointer, key) => `${pointer}/${key.replaceAll('~', '~0').replaceAll('/', '~1')}`

function json(value) {
  if (Array.isArray(value)) {
    return `[${value.map(json).join(',')}]`
  }
  if (value instanceof Map) {
    return `{${[...value].map(([key, member]) => `${JSON.stringify(key)}:${json(member)}`).join(',')}}`
  }
  return typeof value === 'bigint' ? value.toString() : JSON.stringify(value)
}

/** The same for values that are equal, whatever the order of their members. */
function keyOf(value) {
  if (Array.isArray(value)) {
    return `[${value.map(keyOf).join(',')}]`
  }
  if (value instanceof Map) {
    return `{${[...value]
      .map(([key, member]) => `${JSON.stringify(key)}:${keyOf(member)}`)
      .sort()
      .join(',')}}`
  }
  return json(value)
}

function shown(value) {
  const characters = Array.from(json(value))
  return characters.length <= 60 ? characters.join('') : `${characters.slice(0, 57).join('')}...`
}

function typeOf(value) {
  if (value === null) {
    return 'null'
  }
  if (Array.isArray(value)) {
    return 'array'
  }
  return value instanceof Map
    ? 'object'
    : { boolean: 'boolean', bigint: 'integer', number: 'fraction', string: 'string' }[typeof value]
}

const characterCount = (string) => Array.from(string).length

// ---- numbers ------------------------------------------------------------------------------------------------------------
// A bound is digits / 10 ** scale; strict: which itself is out of bounds.

const clamped = (value, low, high) => (value < low ? low : value > high ? high : value)

function boundOf(value, strict) {
  if (typeof value === 'bigint') {
    return { digits: clamped(value, -LARGEST, LARGEST), scale: 0, strict }
  }
  const [, sign, whole, fraction = '', exponent = '0'] = /^(-?)(\d+)(?:\.(\d+))?(?:e([-+]\d+))?$/.exec(String(value))
  const magnitude = BigInt(whole + fraction)
  return { digits: sign ? -magnitude : magnitude, scale: fraction.length - Number(exponent), strict }
}

function compare(a, b) {
  const x = a.digits * 10n ** BigInt(b.scale)
  const y = b.digits * 10n ** BigInt(a.scale)
  return x > y ? 1 : x < y ? -1 : 0
}

function tighter(a, b, sign) {
  if (a === null || b === null) {
    return a ?? b
  }
  const order = sign * compare(a, b)
  return order > 0 || (order === 0 && a.strict) ? a : b
}

function isBetween(value, low, high) {
  const above = low === null || compare(value, low) > 0 || (compare(value, low) === 0 && !low.strict)
  return above && (high === null || compare(value, high) < 0 || (compare(value, high) === 0 && !high.strict))
}

const floorOf = (a, b) => (a >= 0n ? a / b : -((-a + b - 1n) / b))
const ceilOf = (a, b) => -floorOf(-a, b)

function integerBounds(low, high) {
  let least = null
  let most = null
  if (low !== null) {
    const unit = 10n ** BigInt(low.scale)
    least = low.strict ? floorOf(low.digits, unit) + 1n : ceilOf(low.digits, unit)
  }
  if (high !== null) {
    const unit = 10n ** BigInt(high.scale)
    most = high.strict ? ceilOf(high.digits, unit) - 1n : floorOf(high.digits, unit)
  }
  return [least, most]
}

const ANY_DIGIT = Chars([[0x30, 0x39]])
const digitBetween = (low, high) => (low === high ? text(String(low)) : Chars([[0x30 + low, 0x30 + high]]))
const anyDigits = (low, high) => repeat(ANY_DIGIT, low, high)

function outermost(bound) {
  const magnitude = bound === null ? 0n : bound < 0n ? -bound : bound
  return 10n ** BigInt(Math.max(MAX_DIGITS, String(magnitude).length + 1)) - 1n
}

const larger = (a, b) => (a > b ? a : b)

function integers(least, most) {
  const low = least === null ? -outermost(most) : least
  const high = most === null ? outermost(least) : most
  const negative = low < 0n ? sequence(text('-'), naturals(larger(1n, -high), -low)) : NEVER
  return choice(negative, naturals(larger(low, 0n), high))
}

function naturals(low, high) {
  if (high < low) {
    return NEVER
  }
  const parts = []
  let start = low
  for (let n = String(low).length; n <= String(high).length; n++) {
    const most = 10n ** BigInt(n) - 1n
    const end = high < most ? high : most
    parts.push(ofEqualLength(String(start).padStart(n, '0'), String(end)))
    start = end + 1n
  }
  return choice(...parts)
}

/** The strings of digits from low to high. */
function ofEqualLength(low, high) {
  if (low === high) {
    return text(low)
  }
  const rest = low.length - 1
  let a = Number(low[0])
  const b = Number(high[0])
  if (a === b) {
    return sequence(text(low[0]), ofEqualLength(low.slice(1), high.slice(1)))
  }
  const parts = []
  if (/[^0]/.test(low.slice(1))) {
    parts.push(sequence(text(low[0]), ofEqualLength(low.slice(1), '9'.repeat(rest))))
    a += 1
  }
  const whole = /[^9]/.test(high.slice(1)) ? b - 1 : b
  if (a <= whole) {
    parts.push(sequence(digitBetween(a, whole), anyDigits(rest, rest)))
  }
  if (whole < b) {
    parts.push(sequence(text(high[0]), ofEqualLength('0'.repeat(rest), high.slice(1))))
  }
  return choice(...parts)
}

/** Numbers within bounds, without exponents. */
function decimals(low, high) {
  const zero = { digits: 0n, scale: 0, strict: false }
  const negated = (bound) => ({ ...bound, digits: -bound.digits })
  const parts = []
  if (low === null || low.digits < 0n) {
    const nearest = high === null || high.digits > 0n ? zero : negated(high)
    parts.push(sequence(text('-'), magnitudes(nearest, low === null ? null : negated(low))))
  }
  if (high === null || high.digits >= 0n) {
    parts.push(magnitudes(low !== null && low.digits >= 0n ? low : zero, high))
  }
  return choice(...parts)
}

function magnitudes(low, high) {
  const split = ({ digits, scale }) => {
    const unit = 10n ** BigInt(scale)
    return [
      digits / unit,
      digits % unit
        ? String(digits % unit)
            .padStart(scale, '0')
            .replace(/0+$/, '')
        : '',
    ]
  }
  const [first, firstFraction] = split(low)
  const [last, lastFraction] = high === null ? [outermost(first), ''] : split(high)
  const most = EXACT_DIGITS - String(high === null ? first : last).length
  const upper = high ?? { digits: last, scale: 0, strict: false }
  if (compare(low, upper) > 0) {
    return NEVER
  }
  if (first === last) {
    return sequence(
      text(String(first)),
      new Fractions(firstFraction, low.strict, lastFraction, upper.strict, most).written(),
    )
  }
  return choice(
    sequence(text(String(first)), new Fractions(firstFraction, low.strict, null, false, most).written()),
    sequence(naturals(first + 1n, last - 1n), new Fractions(null, false, null, false, most).written()),
    sequence(text(String(last)), new Fractions(null, false, lastFraction, upper.strict, most).written()),
  )
}

/** What may follow the integer part, where the fraction is bounded by `low` and `high` (digits; null: not at all). */
class Fractions {
  constructor(low, lowStrict, high, highStrict, most) {
    Object.assign(this, { low, lowStrict, high, highStrict, most })
  }

  written() {
    const bounded = [this.low !== null, this.high !== null]
    const point = sequence(text('.'), this.digitsFrom(0, ...bounded, false))
    return this.mayEnd(0, ...bounded) ? optional(point) : point
  }

  mayEnd(i, atLow, atHigh) {
    const above = !atLow || (i >= this.low.length && !this.lowStrict)
    return above && (!atHigh || i < this.high.length || !this.highStrict)
  }

  digitsFrom(i, lowMatters, atHigh, mayEnd = true) {
    const atLow = lowMatters && !(i >= this.low.length && !this.lowStrict)
    if (!atLow && !atHigh) {
      return anyDigits(mayEnd ? 0 : 1, this.most - i)
    }
    const parts = mayEnd && this.mayEnd(i, atLow, atHigh) ? [EMPTY] : []
    if (i < this.most && (!atHigh || i < this.high.length)) {
      const a = atLow ? Number(this.low[i] ?? '0') : 0
      const b = atHigh ? Number(this.high[i]) : 9
      if (atLow && atHigh && a === b) {
        parts.unshift(sequence(text(String(a)), this.digitsFrom(i + 1, true, true)))
      } else {
        if (atLow) {
          parts.unshift(sequence(text(String(a)), this.digitsFrom(i + 1, true, false)))
        }
        const first = a + (atLow ? 1 : 0)
        const last = b - (atHigh ? 1 : 0)
        if (first <= last) {
          parts.unshift(sequence(digitBetween(first, last), anyDigits(0, this.most - i - 1)))
        }
        if (atHigh) {
          parts.unshift(sequence(text(String(b)), this.digitsFrom(i + 1, false, true)))
        }
      }
    }
    return choice(...parts)
  }
}

// ---- schemas ------------------------------------------------------------------------------------------------------------

/** A schema at its place; base: the schema with an $id of its own that it is part of, null for the whole. */
class Node {
  constructor(schema, pointer, base) {
    Object.assign(this, { schema, pointer, base })
  }

  below(key) {
    const schema = Array.isArray(this.schema) ? this.schema[Number(key)] : this.schema.get(key)
    return new Node(schema, below(this.pointer, key), this.hasId() ? this : this.base)
  }

  hasId() {
    if (!(this.schema instanceof Map)) {
      return false
    }
    const id = this.schema.get('$id') ?? '#'
    return !(typeof id === 'string' && id.startsWith('#'))
  }

  fail(message) {
    fail(this.pointer, message)
  }
}

const ANYTHING = new Node(true, '#', null)

class ObjectPart {
  constructor(properties = new Map(), patterns = [], additional = null) {
    Object.assign(this, { properties, patterns, additional })
  }

  of(name) {
    const found = this.properties.has(name) ? [this.properties.get(name)] : []
    const isAdditional = !found.length && !this.patterns.some(([, language]) => language.matches(name))
    found.push(...this.patterns.filter(([, language]) => language.generously().matches(name)).map(([, , node]) => node))
    return isAdditional && this.additional !== null ? [...found, this.additional] : found
  }
}

class ArrayPart {
  constructor(prefix = [], items = null) {
    Object.assign(this, { prefix, items })
  }

  of(i) {
    return i < this.prefix.length ? [this.prefix[i]] : this.items === null ? [] : [this.items]
  }
}

const TYPES = {
  null: ['null'],
  boolean: ['boolean'],
  integer: ['integer'],
  number: ['integer', 'fraction'],
  string: ['string'],
  array: ['array'],
  object: ['object'],
}

const both = (a, b, meet) => (a === null ? b : b === null ? a : meet(a, b))
const together = (nodes) => [...new Map(nodes.map((node) => [node.pointer, node])).values()]
const unique = (values) => [...new Set(values)]

/** One alternative: all of this is wanted. */
class Term {
  types = null
  values = null
  low = null
  high = null
  shortest = 0
  longest = null
  languages = new Map()
  arrays = []
  fewestItems = 0
  mostItems = null
  unique = null
  objects = []
  required = []
  fewestMembers = 0
  mostMembers = null
  names = []
  namesMembers = false
  isOpen = false
  where = '#'

  constructor(fields = {}) {
    Object.assign(this, fields)
  }

  meet(other) {
    return new Term({
      types: both(this.types, other.types, (a, b) => a.filter((type) => b.includes(type))),
      values: both(this.values, other.values, (a, b) => {
        const keys = new Set(b.map(keyOf))
        return a.filter((value) => keys.has(keyOf(value)))
      }),
      low: tighter(this.low, other.low, 1),
      high: tighter(this.high, other.high, -1),
      shortest: Math.max(this.shortest, other.shortest),
      longest: both(this.longest, other.longest, Math.min),
      languages: new Map([...this.languages, ...other.languages]),
      arrays: [...this.arrays, ...other.arrays],
      fewestItems: Math.max(this.fewestItems, other.fewestItems),
      mostItems: both(this.mostItems, other.mostItems, Math.min),
      unique: this.unique ?? other.unique,
      objects: [...this.objects, ...other.objects],
      required: unique([...this.required, ...other.required]),
      fewestMembers: Math.max(this.fewestMembers, other.fewestMembers),
      mostMembers: both(this.mostMembers, other.mostMembers, Math.min),
      names: together([...this.names, ...other.names]),
      namesMembers: this.namesMembers || other.namesMembers,
      isOpen: this.isOpen || other.isOpen,
      where: this.where !== '#' ? this.where : other.where,
    })
  }

  isNothing() {
    return this.types?.length === 0 || this.values?.length === 0
  }

  speaksOf() {
    const found = []
    if (this.low !== null || this.high !== null) {
      found.push(...TYPES.number)
    }
    if (this.shortest > 0 || this.longest !== null || this.languages.size) {
      found.push('string')
    }
    if (this.arrays.length || this.fewestItems > 0 || this.mostItems !== null || this.unique !== null) {
      found.push('array')
    }
    const members = this.fewestMembers > 0 || this.mostMembers !== null
    if (this.objects.length || this.required.length || members || this.names.length) {
      found.push('object')
    }
    return found
  }

  element(i) {
    return together(this.arrays.flatMap((part) => part.of(i)))
  }

  prefixLength() {
    return Math.max(0, ...this.arrays.map((part) => part.prefix.length))
  }

  member(name) {
    return together(this.objects.flatMap((part) => part.of(name)))
  }
}

const ANNOTATIONS = new Set(
  (
    '$schema $id id $comment $anchor $vocabulary $defs definitions title description default example examples deprecated ' +
    'readOnly writeOnly contentEncoding contentMediaType contentSchema discriminator xml externalDocs'
  ).split(' '),
)
const INEXPRESSIBLE = [
  'not',
  'if',
  'then',
  'else',
  'contains',
  'minContains',
  'maxContains',
  'multipleOf',
  'divisibleBy',
  'extends',
  'disallow',
  '$dynamicRef',
  '$recursiveRef',
  '$dynamicAnchor',
  '$recursiveAnchor',
]

const SPACE = Rule('space')
const COMMA = sequence(Text(','), SPACE)

/** Turns one schema into rules. */
class Converter {
  rules = new Rules()
  scratch = new Rules() // rules that are made only to see whether there are any
  met = 0
  ruleOf = new Map()
  todo = []
  termsOf = new Map()
  active = new Set()

  constructor(schema, name = 'root') {
    this.root = new Node(schema, '#', null)
    this.start = this.rules.reserve(name)
    BUILTIN.forEach((_, builtin) => this.rules.reserve(builtin))
  }

  convert() {
    BUILTIN.forEach((body, name) => this.rules.define(Rule(name), body))
    this.todo.push([this.start, this.resolved(this.root)])
    for (const [rule, nodes] of this.todo) {
      // which grows meanwhile
      this.rules.define(rule, this.expression(nodes, rule.name))
      if (this.rules.size + this.scratch.size > MAX_SIZE) {
        fail('#', 'the grammar becomes too large')
      }
    }
    return this.rules.text(this.start) ?? fail('#', 'nothing satisfies the schema, or nothing that ends')
  }

  // -- reading

  resolved(node) {
    for (let i = 0; i < MAX_DEPTH; i++) {
      const { schema } = node
      const keywords = schema instanceof Map ? [...schema.keys()].filter((key) => !ANNOTATIONS.has(key)) : null
      if (schema === true || keywords?.length === 0) {
        return []
      }
      if (keywords?.length !== 1 || keywords[0] !== '$ref') {
        return [node]
      }
      node = this.referred(node)
    }
    return node.fail('references lead to references without end')
  }

  referred(node) {
    const reference = node.schema.get('$ref')
    const place = node.below('$ref')
    if (typeof reference !== 'string') {
      place.fail(`must be a string, not ${shown(reference)}`)
    }
    if (!/^#(\/.*)?$/s.test(reference)) {
      place.fail(`only references into the schema itself can be followed, not ${shown(reference)}`)
    }
    let target = (node.hasId() ? node : node.base) ?? this.root
    for (const token of reference.split('/').slice(1)) {
      const key = unescaped(token)
      const { schema } = target
      const found = Array.isArray(schema)
        ? /^(?:0|[1-9][0-9]{0,8})$/.test(key) && Number(key) < schema.length
        : schema instanceof Map && schema.has(key)
      if (!found) {
        place.fail(`there is nothing at ${shown(reference)}`)
      }
      target = target.below(key)
    }
    return target
  }

  terms(nodes) {
    return this.product(
      nodes.map((node) => this.termsOfNode(node)),
      nodes.length ? nodes[0].pointer : '#',
    )
  }

  product(factors, pointer) {
    let result = [new Term()]
    for (const terms of factors) {
      this.met += result.length * terms.length
      if (result.length * terms.length > MAX_ALTERNATIVES || this.met > MAX_MEETINGS) {
        fail(pointer, 'there are too many alternatives')
      }
      result = result.flatMap((a) => terms.map((b) => a.meet(b))).filter((term) => !term.isNothing())
    }
    return result
  }

  termsOfNode(node) {
    if (!this.termsOf.has(node.pointer)) {
      if (this.active.has(node.pointer)) {
        node.fail('the schema refers to itself with nothing in between')
      }
      if (this.active.size >= MAX_DEPTH) {
        node.fail('references lead to references without end')
      }
      this.active.add(node.pointer)
      this.termsOf.set(node.pointer, this.read(node))
      this.active.delete(node.pointer)
    }
    return this.termsOf.get(node.pointer)
  }

  read(node) {
    const { schema } = node
    if (typeof schema === 'boolean') {
      return schema ? [new Term()] : []
    }
    if (!(schema instanceof Map)) {
      node.fail(`a schema must be an object or a boolean, not ${shown(schema)}`)
    }
    for (const keyword of INEXPRESSIBLE) {
      if (schema.has(keyword) && !(keyword === 'multipleOf' && schema.get(keyword) === 1n)) {
        node.below(keyword).fail(`'${keyword}' cannot be expressed as a grammar`)
      }
    }
    const factors = [[readKeywords(node)]]
    for (const child of children(node, 'allOf')) {
      factors.push(this.termsOfNode(child))
    }
    for (const keyword of ['anyOf', 'oneOf']) {
      if (schema.has(keyword)) {
        factors.push(children(node, keyword).flatMap((child) => this.termsOfNode(child)))
      }
    }
    if (schema.has('$ref')) {
      factors.push(this.termsOfNode(this.referred(node)))
    }
    factors.push(...this.dependencies(node))
    const terms = this.product(factors, node.pointer)
    if ((schema.get('oneOf') ?? []).length > 1) {
      this.checkDisjoint(node, factors[0])
    }
    return terms.map((term) => this.withoutUnevaluated(node, term))
  }

  dependencies(node) {
    const factors = []
    for (const keyword of ['dependentRequired', 'dependentSchemas', 'dependencies']) {
      for (const [name, child] of namedChildren(node, keyword)) {
        const absent = new Node(false, `${child.pointer}/absent`, null)
        let present
        if (keyword === 'dependentRequired' || (keyword === 'dependencies' && Array.isArray(child.schema))) {
          present = [new Term({ required: unique([name, ...strings(child)]) })]
        } else {
          present = this.termsOfNode(child).map((term) => new Term({ required: [name] }).meet(term))
        }
        factors.push([new Term({ objects: [new ObjectPart(new Map([[name, absent]]))] }), ...present])
      }
    }
    return factors
  }

  withoutUnevaluated(node, given) {
    let term = given
    for (const keyword of ['unevaluatedItems', 'unevaluatedProperties']) {
      if (!node.schema.has(keyword) || node.schema.get(keyword) === true) {
        continue
      }
      const child = node.below(keyword)
      if (child.schema !== false) {
        child.fail(`'${keyword}' cannot be expressed as a grammar, unless it is a boolean`)
      }
      if (keyword === 'unevaluatedItems') {
        if (term.arrays.every((part) => part.items === null)) {
          const mostItems = both(term.mostItems, term.prefixLength(), Math.min)
          term = new Term({ ...term, arrays: term.arrays.length ? term.arrays : [new ArrayPart()], mostItems })
        }
      } else if (term.objects.every((part) => part.additional === null)) {
        const names = term.objects.flatMap((part) => [...part.properties.keys()])
        const patterns = term.objects
          .flatMap((part) => part.patterns)
          .map(([source, language]) => [source, language, ANYTHING])
        const evaluated = new ObjectPart(new Map(names.map((name) => [name, ANYTHING])), patterns, child)
        term = new Term({ ...term, objects: [...term.objects, evaluated] })
      }
    }
    return term
  }

  checkDisjoint(node, own) {
    const alternatives = children(node, 'oneOf')
    for (let i = 0; i < alternatives.length; i++) {
      for (let j = i + 1; j < alternatives.length; j++) {
        const factors = [own, this.termsOfNode(alternatives[i]), this.termsOfNode(alternatives[j])]
        if (this.product(factors, node.pointer).some((term) => this.isPossible(term, new Set()))) {
          node
            .below('oneOf')
            .fail(`'oneOf' can be expressed where no two alternatives overlap, but ${i} and ${j} may; use 'anyOf'`)
        }
      }
    }
  }

  /** False if nothing satisfies a term for sure. `active`: what is being asked already. */
  isPossible(term, active) {
    if (term.values !== null) {
      return term.values.some((value) => this.fits(value, term, true))
    }
    const types = term.types ?? unique(Object.values(TYPES).flat())
    const may = {
      null: () => true,
      boolean: () => true,
      fraction: () => this.hasNumbers(term),
      integer: () => this.hasIntegers(term),
      string: () => this.hasStrings(term),
      array: () => this.hasArrays(term, active),
      object: () => this.hasObjects(term, active),
    }
    return types.some((type) => may[type]())
  }

  hasNumbers({ low, high }) {
    if (low === null || high === null) {
      return true
    }
    return compare(low, high) < 0 || (compare(low, high) === 0 && !low.strict && !high.strict)
  }

  hasIntegers(term) {
    const [least, most] = integerBounds(term.low, term.high)
    return least === null || most === null || least <= most
  }

  hasStrings(term) {
    if (term.longest !== null && term.longest < term.shortest) {
      return false
    }
    const patterns = [...term.languages]
      .filter(([source]) => !FORMATS.has(source))
      .map(([, language]) => language.generously())
    if (!patterns.length) {
      return true
    }
    try {
      return !isNever(written(this.scratch, 's', patterns, term.shortest, term.longest, Rule('char')))
    } catch (error) {
      if (error instanceof PatternError) {
        return true
      }
      throw error
    }
  }

  hasArrays(term, active) {
    if (term.mostItems !== null && term.mostItems < term.fewestItems) {
      return false
    }
    for (let i = 0; i < Math.min(term.fewestItems, term.prefixLength() + 1); i++) {
      if (!this.arePossible(term.element(i), active)) {
        return false
      }
    }
    return true
  }

  hasObjects(term, active) {
    if (term.mostMembers !== null && term.mostMembers < Math.max(term.fewestMembers, term.required.length)) {
      return false
    }
    return term.required.every((name) => this.arePossible(term.member(name), active))
  }

  arePossible(schemas, active) {
    const nodes = this.conjunction(schemas)
    const key = pointersOf(nodes)
    if (active.has(key) || active.size >= MAX_DEPTH) {
      return true
    }
    active.add(key)
    const result = this.terms(nodes).some((term) => this.isPossible(term, active))
    active.delete(key)
    return result
  }

  // -- judging single values

  accepts(value, nodes, perhaps = false) {
    return this.terms(this.conjunction(nodes)).some((term) => this.satisfies(value, term, perhaps))
  }

  satisfies(value, term, perhaps = false) {
    return (
      (term.values === null || term.values.some((v) => keyOf(v) === keyOf(value))) && this.fits(value, term, perhaps)
    )
  }

  /** The same of one of the term's own values. */
  fits(value, term, perhaps = false) {
    const kind = typeOf(value)
    if (term.types !== null && !term.types.includes(kind)) {
      return false
    }
    const counts = (n, low, high) => n >= low && (high === null || n <= high)
    switch (kind) {
      case 'integer':
      case 'fraction':
        return isBetween(boundOf(value, false), term.low, term.high)
      case 'string':
        return (
          counts(characterCount(value), term.shortest, term.longest) &&
          [...term.languages].every(([source, language]) => belongs(value, source, language, perhaps))
        )
      case 'array':
        return (
          counts(value.length, term.fewestItems, term.mostItems) &&
          (term.unique === null || new Set(value.map(keyOf)).size === value.length) &&
          value.every((element, i) => this.accepts(element, term.element(i), perhaps))
        )
      case 'object':
        return (
          counts(value.size, term.fewestMembers, term.mostMembers) &&
          term.required.every((name) => value.has(name)) &&
          [...value.keys()].every((name) => this.accepts(name, term.names, perhaps)) &&
          [...value].every(([name, member]) => this.accepts(member, term.member(name), perhaps))
        )
    }
    return true
  }

  // -- writing

  conjunction(nodes) {
    return together(nodes.flatMap((node) => this.resolved(node)))
  }

  rule(schemas, hint) {
    const nodes = this.conjunction(schemas)
    if (!nodes.length) {
      return Rule('value')
    }
    const key = pointersOf(nodes)
    if (!this.ruleOf.has(key)) {
      const { pointer } = nodes[0]
      const rule = this.rules.reserve(
        pointer.includes('/$defs/') ? unescaped(pointer.slice(pointer.lastIndexOf('/') + 1)) : hint,
      )
      this.ruleOf.set(key, rule)
      this.todo.push([rule, nodes])
    }
    return this.ruleOf.get(key)
  }

  expression(nodes, hint) {
    if (!nodes.length) {
      return Rule('value')
    }
    return choice(...this.terms(nodes).map((term) => this.termExpression(term, hint)))
  }

  termExpression(term, hint) {
    if (term.values !== null) {
      return choice(...term.values.filter((value) => this.fits(value, term)).map((value) => text(json(value))))
    }
    const types = term.types ?? term.speaksOf()
    if (!types.length) {
      return Rule('value')
    }
    const parts = []
    if (types.includes('object')) {
      parts.push(this.object(term, hint))
    }
    if (types.includes('array')) {
      parts.push(this.array(term, hint))
    }
    if (types.includes('string')) {
      parts.push(this.string(term, hint))
    }
    if (types.includes('fraction')) {
      const bounded = term.low !== null || term.high !== null
      parts.push(bounded ? this.rules.share('number', decimals(term.low, term.high)) : Rule('number'))
    } else if (types.includes('integer')) {
      const [least, most] = integerBounds(term.low, term.high)
      const bounded = least !== null || most !== null
      parts.push(bounded ? this.rules.share('integer', integers(least, most)) : Rule('integer'))
    }
    if (types.includes('boolean')) {
      parts.push(Text('true'), Text('false'))
    }
    if (types.includes('null')) {
      parts.push(Text('null'))
    }
    return choice(...parts)
  }

  string(term, hint) {
    if (!term.languages.size && term.shortest === 0 && term.longest === null) {
      return Rule('string')
    }
    return this.rules.share('string', sequence(Text('"'), this.insideString(term, hint, [], every), Text('"')))
  }

  insideString(term, hint, others, wanted) {
    const languages = [...others, ...term.languages.values()]
    const [low, high] = counted(term.shortest, term.longest, term.where)
    try {
      return written(this.rules, `${hint}-text`, languages, low, high, Rule('char'), wanted)
    } catch (error) {
      if (!(error instanceof PatternError)) {
        throw error
      }
      return fail(term.where, `${[...term.languages.keys()].join(' and ') || 'a name'}: ${error.message}`)
    }
  }

  array(term, hint) {
    let n = term.prefixLength()
    let [low, high] = counted(term.fewestItems, term.mostItems, term.where)
    if (n > 0 && low <= n && term.arrays.every((part) => part.items === null)) {
      high = high === null ? n : Math.min(high, n)
    }
    if (term.unique !== null && (high === null || high > 1)) {
      return this.uniqueArray(term, hint, low, high)
    }
    if (high !== null && high < low) {
      return NEVER
    }
    n = high === null ? n : Math.min(n, high)
    let inside = NEVER
    for (let i = n; i >= 0; i--) {
      if (i === n) {
        const item = high === null || high > n ? this.rule(term.element(i), 'item') : NEVER
        inside = separated(item, i > 0, Math.max(low - i, 0), high === null ? null : high - i)
        continue
      }
      inside = sequence(...(i > 0 ? [COMMA] : []), this.rule(term.element(i), 'item'), inside)
      inside = this.rules.share('items', i < low ? inside : optional(inside))
    }
    return sequence(Text('['), inside, Text(']'))
  }

  uniqueArray(term, hint, low, high) {
    const terms = this.terms(this.conjunction(term.element(0)))
    if (term.prefixLength() > 0 || terms.some((t) => t.values === null)) {
      fail(term.unique, "'uniqueItems' can be expressed for enumerated values only")
    }
    const values = new Map(terms.flatMap((t) => t.values.filter((v) => this.fits(v, t))).map((v) => [keyOf(v), v]))
    const members = [...values.values()].map((value) => [text(json(value)), false])
    return sequence(Text('['), this.chain(members, NEVER, low, high, hint, term.where), Text(']'))
  }

  object(term, hint) {
    const names = new Set([...term.objects.flatMap((part) => [...part.properties.keys()]), ...term.required])
    const [low, high] = counted(term.fewestMembers, term.mostMembers, term.where)
    const isOpen = term.isOpen || !term.namesMembers || low > names.size
    const nameTerms = this.terms(this.conjunction(term.names))
    for (const t of nameTerms) {
      ;(t.values ?? []).filter((v) => typeof v === 'string' && this.fits(v, t)).forEach((v) => names.add(v))
    }
    const members = []
    for (const name of names) {
      const allowed = nameTerms.some((t) => this.satisfies(name, t))
      const member = allowed ? sequence(text(`${json(name)}:`), SPACE, this.rule(term.member(name), name)) : NEVER
      members.push([member, term.required.includes(name)])
    }
    let extra = NEVER
    if (isOpen) {
      const others = nameTerms.filter((t) => t.values === null).flatMap((t) => this.otherMembers(term, t, [...names]))
      extra = this.rules.share('member', choice(...others))
    }
    return sequence(Text('{'), this.chain(members, extra, low, high, hint, term.where), Text('}'))
  }

  /** Members that are not named, by the patterns that their names match. */
  otherMembers(term, nameTerm, names) {
    if (nameTerm.types !== null && !nameTerm.types.includes('string')) {
      return []
    }
    const patterns = new Map(
      term.objects.flatMap((part) => part.patterns).map(([source, language]) => [source, language]),
    )
    if (patterns.size > MAX_PATTERNS) {
      fail(term.where, `at most ${MAX_PATTERNS} 'patternProperties' can be expressed`)
    }
    const members = []
    const named = names.length ? [namesLanguage(names)] : []
    const sources = [...patterns.keys()]
    for (let bits = 0; bits < 1 << sources.length; bits++) {
      const found = sources.map((_, i) => (bits >> (sources.length - 1 - i)) & 1)
      const matching = new Set(sources.filter((_, i) => found[i]))
      const languages = sources.map((source, i) =>
        found[i] ? patterns.get(source) : patterns.get(source).generously(),
      )
      const others = [...named, ...languages]
      const expected = [...named.map(() => false), ...found.map(Boolean)]
      const schemas = term.objects.flatMap((part) => {
        const ofPart = part.patterns.filter(([source]) => matching.has(source)).map(([, , node]) => node)
        return ofPart.length || part.additional === null ? ofPart : [part.additional]
      })
      if (schemas.some((node) => node.schema === false)) {
        continue
      }
      const wanted = (accepted) =>
        expected.every((e, i) => e === accepted[i]) && accepted.slice(expected.length).every(Boolean)
      const key = this.insideString(nameTerm, 'name', others, expected.every(Boolean) ? every : wanted)
      members.push(sequence(Text('"'), key, Text('":'), SPACE, this.rule(schemas, 'other')))
    }
    return members
  }

  chain(members, extra, fewest, most, hint, where) {
    let low = fewest
    let high = most
    const nRequired = members.filter(([, required]) => required).length
    const firstRequired = members.findIndex(([, required]) => required)
    const first = firstRequired < 0 ? members.length : firstRequired
    if (high !== null && isNever(extra) && high >= members.length) {
      high = null
    }
    if (high === null && low <= nRequired) {
      low = 0
    }
    if (high !== null && high < Math.max(low, nRequired)) {
      return NEVER
    }
    if (low > members.length + 1 || (low > members.length && isNever(extra))) {
      return isNever(extra)
        ? NEVER
        : fail(where, `so many members, at least ${low}, can be expressed only if enough are named`)
    }
    const enough = high === null ? Math.max(low, 1) : high
    if (enough > 1 && enough * members.length > MAX_COMBINATIONS) {
      fail(where, 'so many combinations of members cannot be expressed')
    }
    let after = []
    for (let n = 0; n <= enough; n++) {
      const missing = Math.max(low - n, 0)
      after.push(missing > 1 ? NEVER : separated(extra, n > 0, missing, high === null ? null : high - n))
    }
    for (let i = members.length - 1; i >= 0; i--) {
      const [member, required] = members[i]
      const before = []
      for (let n = 0; n <= Math.min(i, enough); n++) {
        if (n === 0 && i > first) {
          before.push(NEVER) // one has come for sure
          continue
        }
        let following = high === null || n < high ? after[Math.min(n + 1, enough)] : NEVER
        if (enough > 1 || (i > 0 && i <= first) || i % 64 === 0) {
          following = this.rules.share(`${hint}-rest`, following)
        }
        const memberHere = n > 0 ? sequence(COMMA, member) : member
        if (!required && n === enough && high === null) {
          before.push(sequence(optional(memberHere), following))
          continue
        }
        const taken = sequence(memberHere, following)
        const otherwise = i % 64 === 0 && i > 0 ? this.rules.share(`${hint}-rest`, after[n]) : after[n]
        before.push(required ? taken : choice(taken, otherwise))
      }
      after = before
    }
    return after[0]
  }
}

/** Whether a string belongs to a pattern's or a format's language. Of formats, the grammars know a part only. */
function belongs(string, source, language, perhaps) {
  return perhaps ? FORMATS.has(source) || language.generously().matches(string) : language.matches(string)
}

/** `low` to `high` of the same, with commas between them. */
function separated(item, isAfterAnother, low, high) {
  const further = sequence(COMMA, item)
  if (isAfterAnother || (high !== null && high < 1)) {
    return repeat(further, low, high)
  }
  const several = sequence(item, repeat(further, Math.max(low - 1, 0), high === null ? null : high - 1))
  return low > 0 ? several : optional(several)
}

function counted(low, high, where) {
  if (low > MAX_COUNT) {
    fail(where, `lengths of more than ${MAX_COUNT} cannot be expressed`)
  }
  return [low, high === null ? null : Math.min(high, MAX_COUNT)]
}

const pointersOf = (nodes) => JSON.stringify(nodes.map((node) => node.pointer))

function unescaped(token) {
  const decoded = token.replace(/(?:%[0-9A-Fa-f]{2})+/g, (bytes) => {
    const codes = bytes
      .slice(1)
      .split('%')
      .map((code) => parseInt(code, 16))
    return new TextDecoder('utf-8', { ignoreBOM: true }).decode(new Uint8Array(codes))
  })
  return decoded.replaceAll('~1', '/').replaceAll('~0', '~')
}

// ---- keywords -----------------------------------------------------------------------------------------------------------

function children(node, keyword) {
  if (!node.schema.has(keyword)) {
    return []
  }
  const child = node.below(keyword)
  if (!Array.isArray(child.schema) || !child.schema.length) {
    child.fail(`must be a list of schemas, not ${shown(child.schema)}`)
  }
  return child.schema.map((_, i) => child.below(String(i)))
}

function namedChildren(node, keyword) {
  if (!node.schema.has(keyword)) {
    return []
  }
  const child = node.below(keyword)
  if (!(child.schema instanceof Map)) {
    child.fail(`must be an object, not ${shown(child.schema)}`)
  }
  return [...child.schema.keys()].map((name) => [name, child.below(name)])
}

function strings(node) {
  if (!Array.isArray(node.schema) || !node.schema.every((s) => typeof s === 'string')) {
    node.fail(`must be a list of strings, not ${shown(node.schema)}`)
  }
  return node.schema
}

/** What a schema says itself, without the schemas that it is put together from. */
function readKeywords(node) {
  const { schema } = node
  const [low, high] = readBounds(node)
  const objects = readObjects(node)
  return new Term({
    types: readTypes(node),
    values: readValues(node),
    low,
    high,
    shortest: readCount(node, 'minLength', 0),
    longest: readCount(node, 'maxLength', null),
    languages: readLanguages(node),
    arrays: readArrays(node),
    fewestItems: readCount(node, 'minItems', 0),
    mostItems: readCount(node, 'maxItems', null),
    unique: readFlag(node, 'uniqueItems') ? below(node.pointer, 'uniqueItems') : null,
    objects,
    required: readRequired(node),
    fewestMembers: readCount(node, 'minProperties', 0),
    mostMembers: readCount(node, 'maxProperties', null),
    names: schema.has('propertyNames') ? [node.below('propertyNames')] : [],
    namesMembers: schema.has('properties'),
    isOpen:
      schema.has('patternProperties') ||
      schema.has('propertyNames') ||
      (schema.get('additionalProperties') ?? false) !== false,
    where: node.pointer,
  })
}

function readFlag(node, keyword) {
  const value = node.schema.has(keyword) ? node.schema.get(keyword) : false
  if (typeof value !== 'boolean') {
    node.below(keyword).fail(`must be a boolean, not ${shown(value)}`)
  }
  return value
}

function readCount(node, keyword, otherwise) {
  if (!node.schema.has(keyword)) {
    return otherwise
  }
  const value = node.schema.get(keyword)
  if (typeof value !== 'bigint' || value < 0n) {
    node.below(keyword).fail(`must be an integer, not negative, but is ${shown(value)}`)
  }
  return Number(clamped(value, 0n, LARGEST))
}

function readTypes(node) {
  if (!node.schema.has('type')) {
    return null
  }
  const given = node.schema.get('type')
  const names = Array.isArray(given) ? given : [given]
  if (!names.every((name) => typeof name === 'string' && Object.hasOwn(TYPES, name))) {
    node.below('type').fail(`must be one or several of ${Object.keys(TYPES).join(', ')}, not ${shown(given)}`)
  }
  return unique([...names.flatMap((name) => TYPES[name]), ...(readFlag(node, 'nullable') ? ['null'] : [])])
}

function readValues(node) {
  const { schema } = node
  let values = null
  if (schema.has('enum')) {
    values = schema.get('enum')
    if (!Array.isArray(values)) {
      node.below('enum').fail(`must be a list, not ${shown(values)}`)
    }
  }
  if (schema.has('const')) {
    const wanted = schema.get('const')
    values = values === null ? [wanted] : values.filter((value) => keyOf(value) === keyOf(wanted))
  }
  return values === null ? null : [...new Map(values.map((value) => [keyOf(value), value])).values()]
}

function readNumber(node, keyword) {
  if (!node.schema.has(keyword)) {
    return null
  }
  const value = node.schema.get(keyword)
  if (typeof value !== 'bigint' && typeof value !== 'number') {
    node.below(keyword).fail(`must be a number, not ${shown(value)}`)
  }
  return value
}

function readLimit(node, keyword, sign) {
  const value = readNumber(node, keyword)
  if (value !== null && (sign > 0 ? value > LARGEST : value < -LARGEST)) {
    node.below(keyword).fail('leaves only numbers that are too large to be expressed as a grammar')
  }
  return value
}

function readBounds(node) {
  return [
    ['minimum', 'exclusiveMinimum', 1],
    ['maximum', 'exclusiveMaximum', -1],
  ].map(([inclusive, exclusive, sign]) => {
    const value = readLimit(node, inclusive, sign)
    const strict = node.schema.get(exclusive)
    const bound = value === null ? null : boundOf(value, strict === true)
    if (typeof strict === 'boolean') {
      // draft 4
      return bound
    }
    const limit = readLimit(node, exclusive, sign)
    return tighter(bound, limit === null ? null : boundOf(limit, true), sign)
  })
}

function readLanguages(node) {
  const found = new Map()
  if (node.schema.has('pattern')) {
    const pattern = node.below('pattern')
    if (typeof pattern.schema !== 'string') {
      pattern.fail(`must be a string, not ${shown(pattern.schema)}`)
    }
    found.set(`pattern ${shown(pattern.schema)}`, languageOf(pattern, pattern.schema))
  }
  if (node.schema.has('format')) {
    const format = node.below('format')
    if (typeof format.schema !== 'string') {
      format.fail(`must be a string, not ${shown(format.schema)}`)
    }
    if (UNKNOWN_LANGUAGES.includes(format.schema)) {
      format.fail(`the format ${shown(format.schema)} cannot be expressed as a grammar`)
    }
    if (FORMATS.has(format.schema)) {
      found.set(format.schema, formatLanguage(format.schema))
    }
  }
  return found
}

function readArrays(node) {
  const { schema } = node
  const items = schema.get('items')
  let prefix = []
  let rest = schema.has('items') ? node.below('items') : null
  if (Array.isArray(items)) {
    if (schema.has('prefixItems')) {
      node.below('items').fail("must be a schema beside 'prefixItems', not a list")
    }
    prefix = items.length ? children(node, 'items') : []
    rest = schema.has('additionalItems') ? node.below('additionalItems') : null
  } else if (schema.has('prefixItems')) {
    prefix = children(node, 'prefixItems')
  }
  return prefix.length || rest !== null ? [new ArrayPart(prefix, rest)] : []
}

function readObjects(node) {
  const properties = new Map(namedChildren(node, 'properties'))
  const patterns = namedChildren(node, 'patternProperties').map(([source, child]) => [
    source,
    languageOf(child, source),
    child,
  ])
  const additional = node.schema.has('additionalProperties') ? node.below('additionalProperties') : null
  if (properties.size || patterns.length || additional !== null || node.schema.has('properties')) {
    return [new ObjectPart(properties, patterns, additional)]
  }
  return []
}

function readRequired(node) {
  if (!node.schema.has('required') || typeof node.schema.get('required') === 'boolean') {
    // a boolean: draft 3
    return []
  }
  return unique(strings(node.below('required')))
}

function languageOf(node, source) {
  try {
    return patternLanguage(source)
  } catch (error) {
    if (!(error instanceof PatternError)) {
      throw error
    }
    return node.fail(`pattern ${shown(source)}: ${error.message}`)
  }
}

// ---- rules that every grammar may use -----------------------------------------------------------------------------------

function builtinRules() {
  const hexDigit = Chars(
    merged([
      [0x30, 0x39],
      [0x41, 0x46],
      [0x61, 0x66],
    ]),
  )
  const beforeD = Chars(
    merged([
      [0x30, 0x39],
      [0x41, 0x43],
      [0x45, 0x46],
      [0x61, 0x63],
      [0x65, 0x66],
    ]),
  )
  const two = repeat(hexDigit, 2, 2)
  const unicode = choice(
    sequence(beforeD, repeat(hexDigit, 3, 3)),
    sequence(oneOf('dD'), oneOf('01234567'), two),
    sequence(oneOf('dD'), oneOf('89abAB'), two, Text('\\u'), oneOf('dD'), oneOf('cdefCDEF'), two),
  )
  const unescapedOnes = Chars(
    merged([
      [0x20, 0x21],
      [0x23, 0x5b],
      [0x5d, LAST_CODE_POINT],
    ]),
  )
  const escapedOnes = sequence(Text('\\'), choice(oneOf('"\\/bfnrt'), sequence(Text('u'), unicode)))
  const member = sequence(Rule('string'), Text(':'), SPACE, Rule('value'))
  const whole = choice(Text('0'), sequence(digitBetween(1, 9), anyDigits(0, MAX_DIGITS - 1)))
  const exponent = sequence(oneOf('eE'), optional(oneOf('-+')), anyDigits(1, 2))
  return new Map([
    ['value', choice(...['object', 'array', 'string', 'number'].map(Rule), ...['true', 'false', 'null'].map(Text))],
    ['object', sequence(Text('{'), separated(member, false, 0, null), Text('}'))],
    ['array', sequence(Text('['), separated(Rule('value'), false, 0, null), Text(']'))],
    ['string', sequence(Text('"'), repeat(Rule('char'), 0, null), Text('"'))],
    ['char', choice(unescapedOnes, escapedOnes)],
    [
      'number',
      sequence(optional(Text('-')), whole, optional(sequence(Text('.'), anyDigits(1, MAX_DIGITS))), optional(exponent)),
    ],
    ['integer', sequence(optional(Text('-')), whole)],
    ['space', optional(Text(' '))],
  ])
}

const BUILTIN = builtinRules()
