// The settings: how answers are sampled, and what form they must have. Only what differs from the server's defaults is kept
// and sent.

import { $, el, iconButton } from './dom.js'
import { recall, remember } from './store.js'

// Ranges are those that make sense, not all that are possible: the field beside a slider takes any number.
const GROUPS = [
  {
    title: 'Basics',
    isOpen: true,
    options: [
      { name: 'temperature', label: 'Temperature', usual: 0.8, low: 0, high: 2, step: 0.05,
        help: 'How daring the choice of words is. 0 always takes the likeliest.' },
      { name: 'n_predict', label: 'Longest answer', usual: -1, low: -1, high: 2048, step: 1, least: -1,
        help: 'In tokens, about ¾ of a word each. −1: a chat ends of itself, a text after 256.' },
      { name: 'top_p', label: 'Top p', usual: 0.95, low: 0, high: 1, step: 0.01,
        help: 'Keeps the likeliest words that together reach this probability. 1 is off.' },
      { name: 'top_k', label: 'Top k', usual: 40, low: 0, high: 200, step: 1,
        help: 'Keeps this many of the likeliest words. 0 is off.' },
      { name: 'min_p', label: 'Min p', usual: 0.05, low: 0, high: 1, step: 0.01,
        help: 'Drops words that are less likely than this share of the likeliest. 0 is off.' },
    ],
  },
  {
    title: 'Repetition',
    options: [
      { name: 'repeat_penalty', label: 'Repeat penalty', usual: 1.1, low: 1, high: 2, step: 0.01,
        help: 'Makes recent words less likely. 1 is off.' },
      { name: 'repeat_last_n', label: 'Recent tokens', usual: 64, low: -1, high: 1024, step: 1, least: -1,
        help: 'How far back counts as recent. 0 is off, −1 everything.' },
      { name: 'presence_penalty', label: 'Presence penalty', usual: 0, low: -2, high: 2, step: 0.05,
        help: 'Against every word that has occurred, however often. 0 is off.' },
      { name: 'frequency_penalty', label: 'Frequency penalty', usual: 0, low: -2, high: 2, step: 0.05,
        help: 'Against words in proportion to how often they occurred. 0 is off.' },
      { name: 'penalize_nl', label: 'Penalize line breaks', usual: true,
        help: 'Whether new lines count as repeated words.' },
    ],
  },
  {
    title: 'More sampling',
    options: [
      { name: 'tfs_z', label: 'Tail-free z', usual: 1, low: 0, high: 1, step: 0.01,
        help: 'Cuts off the tail of unlikely words where their probabilities flatten. 1 is off.' },
      { name: 'typical_p', label: 'Typical p', usual: 1, low: 0, high: 1, step: 0.01,
        help: 'Keeps words about as surprising as one would expect here. 1 is off.' },
      { name: 'mirostat', label: 'Mirostat', usual: 0, choices: [[0, 'Off'], [1, '1'], [2, '2']],
        help: 'Steers towards an even surprise, in place of top k, top p and the others.' },
      { name: 'mirostat_tau', label: 'Mirostat tau', usual: 5, low: 0, high: 10, step: 0.1,
        help: 'The surprise it aims at, in bits.' },
      { name: 'mirostat_eta', label: 'Mirostat eta', usual: 0.1, low: 0, high: 1, step: 0.01,
        help: 'How fast it corrects itself.' },
    ],
  },
  {
    title: 'Ends and extras',
    options: [
      { name: 'seed', label: 'Seed', usual: -1, low: -1, high: 4294967295, step: 1, least: -1, isPlain: true,
        help: 'The same seed gives the same answer again. −1 takes another one each time.' },
      { name: 'stop', label: 'Stop at', usual: '', isText: true, help: 'Texts that end an answer, one a line.' },
      { name: 'ignore_eos', label: 'Never end', usual: false, help: 'Goes on after the model has come to an end.' },
      { name: 'n_probs', label: 'Probabilities', usual: 0, low: 0, high: 20, step: 1, most: 20,
        help: 'Shows, on hover, this many words that were likely in each place.' },
    ],
  },
]

const OPTIONS = GROUPS.flatMap(({ options }) => options)

const PRESETS = [
  { label: 'Exact', help: 'The likeliest words, the same every time', values: { temperature: 0 } },
  { label: 'Careful', help: 'Sober and to the point', values: { temperature: 0.3, top_p: 0.9 } },
  { label: 'Balanced', help: 'The server’s defaults', values: {} },
  { label: 'Inventive', help: 'Surprising words, still sentences', values: { temperature: 1.2, top_p: 0.98, min_p: 0.08 } },
]
const PRESET_NAMES = ['temperature', 'top_p', 'top_k', 'min_p']

const GRAMMAR_EXAMPLE = 'root ::= ("yes" | "no") "."'
const SCHEMA_EXAMPLE = `{
  "type": "object",
  "properties": {
    "name": { "type": "string" },
    "age": { "type": "integer" }
  },
  "required": ["name", "age"]
}`

export class Settings {
  #values = recall('settings', {})  // what differs from the usual
  #usual = Object.fromEntries(OPTIONS.map(({ name, usual }) => [name, usual]))
  #controls = new Map()  // by name: a function that shows the value

  constructor() {
    $('setting-groups').append(...GROUPS.map((group) => this.#group(group)))
    $('presets').append(...PRESETS.map((preset) => this.#preset(preset)))
    $('reset').addEventListener('click', () => this.#replace({}))
    this.#shape()
    this.#show()
  }

  // The server's defaults stand for ours: its settings are those of /model.json.
  set defaults({ temp, ...settings }) {
    const usual = { ...settings, temperature: temp }
    for (const { name } of OPTIONS) if (['number', 'boolean'].includes(typeof usual[name])) this.#usual[name] = usual[name]
    if (this.#usual.seed === 4294967295) this.#usual.seed = -1
    this.#show()
  }

  // The options of a request. Throws when the schema is none.
  async options() {
    const options = {}
    for (const { name } of OPTIONS) if (name in this.#values) options[name] = this.#values[name]
    if (options.stop !== undefined) options.stop = options.stop.split('\n').filter(Boolean)
    const { shape, grammar = '', schema = '' } = this.#values
    if (shape === 'grammar' && grammar.trim()) options.grammar = grammar
    if (shape === 'schema' && schema.trim()) options.grammar = await grammarOf(schema)
    return options
  }

  // Whether answers have no limit but that of the model or the context.
  get isEndless() {
    return this.#usual.n_predict === -1 && this.#values.n_predict === undefined
  }

  // Takes a value; the usual one is forgotten.
  set(name, value) {
    const values = { ...this.#values, [name]: value }
    if (value === this.#usual[name] || value === undefined) delete values[name]
    this.#replace(values)
  }

  #get = (name) => this.#values[name] ?? this.#usual[name]

  #replace(values) {
    this.#values = values
    remember('settings', values)
    this.#show()
  }

  #show() {
    for (const show of this.#controls.values()) show()
    const n = Object.keys(this.#values).filter((name) => name in this.#usual).length + (this.#values.shape ? 1 : 0)
    $('reset').disabled = n === 0
    $('settings-changed').hidden = n === 0
  }

  // ---- controls -----------------------------------------------------------------------------------------------------------

  #preset({ label, help, values }) {
    const button = el('button', {
      type: 'button',
      title: help,
      onclick: () => {
        const others = Object.entries(this.#values).filter(([name]) => !PRESET_NAMES.includes(name))
        this.#replace({ ...Object.fromEntries(others), ...values })
      },
    }, label)
    this.#controls.set(`preset ${label}`, () => {
      const isOn = PRESET_NAMES.every((name) => this.#values[name] === values[name])
      button.setAttribute('aria-pressed', String(isOn))
    })
    return button
  }

  #group({ title, options, isOpen = false }) {
    const mark = el('span', { class: 'changed', title: 'Changed' })
    this.#controls.set(`group ${title}`, () => { mark.hidden = !options.some(({ name }) => name in this.#values) })
    return el('details', { open: isOpen }, el('summary', {}, title, mark), ...options.map((option) => this.#control(option)))
  }

  #control(option) {
    const { name, label, help } = option
    const id = `option-${name}`
    const [...inputs] = this.#inputs(option, id)
    const reset = iconButton('again', `Reset ${label}`, () => this.set(name, undefined), { class: 'reset-one' })
    const control = el('div', { class: `option ${option.isText || option.choices ? 'tall' : ''}` },
      el('label', { htmlFor: id }, label), reset, ...inputs, el('p', { id: `${id}-help` }, help))
    this.#controls.set(name, () => {
      reset.hidden = !(name in this.#values)
      for (const input of inputs) input.show()
    })
    return control
  }

  #inputs(option, id) {
    const { name, usual } = option
    const described = { 'aria-describedby': `${id}-help` }
    if (option.choices) {
      const input = el('select', { id, ...described, onchange: () => this.set(name, Number(input.value)) },
        ...option.choices.map(([value, text]) => el('option', { value }, text)))
      input.show = () => { input.value = this.#get(name) }
      return [input]
    }
    if (option.isText) {
      const onchange = () => this.set(name, input.value)
      const input = el('textarea', { id, rows: 2, spellcheck: false, ...described, onchange })
      input.show = () => { input.value = this.#get(name) }
      return [input]
    }
    if (typeof usual === 'boolean') {
      const onchange = () => this.set(name, input.checked)
      const input = el('input', { id, type: 'checkbox', role: 'switch', ...described, onchange })
      input.show = () => { input.checked = this.#get(name) }
      return [input]
    }
    return this.#numberInputs(option, id, described)
  }

  // A field, and a slider where the range is one that can be slid over.
  #numberInputs({ name, label, low, high, step, least, most, isPlain }, id, described) {
    const field = el('input', {
      id, type: 'number', step: step < 1 ? 'any' : step, inputMode: 'decimal', ...described,
      min: least ?? (low === 0 ? 0 : undefined), max: most,
      onchange: () => {
        if (field.value !== '' && field.checkValidity()) this.set(name, field.valueAsNumber)
        else field.show()
      },
    })
    field.show = () => { field.value = this.#get(name) }
    if (isPlain) return [field]
    const slider = el('input', {
      type: 'range', min: low, max: high, step, tabIndex: -1, 'aria-hidden': 'true',
      oninput: () => this.set(name, slider.valueAsNumber),
    })
    slider.show = () => {
      slider.value = this.#get(name)
      slider.style.setProperty('--at', `${(100 * (slider.value - low)) / (high - low)}%`)
    }
    return [field, slider]
  }

  // ---- the form of answers ------------------------------------------------------------------------------------------------

  #shape() {
    const radios = [...document.getElementsByName('shape')]
    for (const radio of radios) radio.addEventListener('change', () => this.set('shape', radio.value || undefined))
    for (const name of ['grammar', 'schema']) {
      const field = $(name)
      field.placeholder = name === 'grammar' ? GRAMMAR_EXAMPLE : SCHEMA_EXAMPLE
      field.addEventListener('input', () => this.set(name, field.value || undefined))
      this.#controls.set(name, () => {
        const value = this.#values[name] ?? ''
        if (field.value !== value) field.value = value  // or the cursor would jump
      })
    }
    $('to-grammar').addEventListener('click', async () => {
      const grammar = await grammarOf(this.#values.schema)
      this.#replace({ ...this.#values, shape: 'grammar', grammar })
      $('grammar').focus()
    })
    this.#controls.set('shape', () => {
      const { shape = '', schema = '' } = this.#values
      for (const radio of radios) radio.checked = radio.value === shape
      $('grammar-box').hidden = shape !== 'grammar'
      $('schema-box').hidden = shape !== 'schema'
      if (shape === 'schema') this.#checkSchema(schema)
    })
  }

  async #checkSchema(schema) {
    const complaint = schema.trim() ? await grammarOf(schema).then(() => '', ({ message }) => message) : ''
    $('schema-error').textContent = complaint
    $('to-grammar').disabled = Boolean(complaint) || !schema.trim()
  }
}

// The grammar of a schema's text. What converts it is fetched when it is needed first.
async function grammarOf(text) {
  try {
    JSON.parse(text)
  } catch (error) {
    throw new Error(`The schema is not JSON: ${error.message}`)
  }
  const { schemaToGrammar } = await import('./json-schema-to-grammar.mjs')
  return schemaToGrammar(text)
}
