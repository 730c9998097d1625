// Small helpers around the DOM.

export const $ = (id) => document.getElementById(id)

// An element. Properties are set as they are, 'class' and names with a hyphen as attributes, functions named on… as listeners.
// Children are nodes, texts, and arrays of them.
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag)
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue
    if (typeof value === 'function') element.addEventListener(name.slice(2), value)
    else if (name === 'class' || name === 'role' || name.includes('-')) element.setAttribute(name, value)
    else element[name] = value
  }
  for (const child of children.flat()) if (child !== undefined && child !== null && child !== false) element.append(child)
  return element
}

const SVG = 'http://www.w3.org/2000/svg'

// One of the symbols at the top of index.html.
export function icon(name) {
  const svg = document.createElementNS(SVG, 'svg')
  svg.setAttribute('class', 'icon')
  svg.setAttribute('aria-hidden', 'true')
  const use = document.createElementNS(SVG, 'use')
  use.setAttribute('href', `#icon-${name}`)
  svg.append(use)
  return svg
}

// A button with an icon only; its name is told to who cannot see it, and shown on hover.
export function iconButton(name, label, onclick, properties = {}) {
  const { class: more = '', ...rest } = properties
  const own = { type: 'button', class: `icon-button ${more}`, title: label, 'aria-label': label, onclick }
  return el('button', { ...own, ...rest }, icon(name))
}

// Copies a text. Pages that come over plain HTTP from another machine have no clipboard, but may copy a selection.
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text)
  } catch {
    const area = el('textarea', { value: text, class: 'visually-hidden' })
    const focused = document.activeElement
    document.body.append(area)
    area.select()
    document.execCommand('copy')
    area.remove()
    focused?.focus()
  }
}

// A button that copies what text() returns, and says that it did.
export function copyButton(text, label = 'Copy') {
  const button = iconButton('copy', label, async () => {
    await copy(text())
    button.replaceChildren(icon('check'))
    announce('Copied')
    setTimeout(() => button.replaceChildren(icon('copy')), 1500)
  })
  return button
}

// Tells something to screen readers.
export function announce(text) {
  $('announcer').textContent = ''
  requestAnimationFrame(() => { $('announcer').textContent = text })
}

// Shows one of two buttons in the same place: the second when `isSecond`. The focus goes along.
export function exchange(isSecond, first, second) {
  const [shown, other] = isSecond ? [second, first] : [first, second]
  const hasFocus = document.activeElement === other
  shown.hidden = false
  if (hasFocus) shown.focus()
  other.hidden = true
}

// Calls a function once in the next frame, however often it is asked to.
export function onceAFrame(run) {
  let frame = 0
  return () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0
      run()
    })
  }
}

// Offers a file to be saved.
export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }))
  el('a', { href: url, download: name }).click()
  setTimeout(() => URL.revokeObjectURL(url), 10_000)
}

// Asks a question in a dialog; the answer is the text of its field (true where it has none), or null.
export function ask({ title, text = '', field = null, type = 'text', value = '', confirm = 'OK', danger = false }) {
  return new Promise((resolve) => {
    const input = field && el('input', { type, value, autocomplete: 'off', required: true })
    const dialog = el('dialog', { 'aria-labelledby': 'ask-title' },
      el('form', { method: 'dialog', onsubmit: () => dialog.close('yes') },
        el('h2', { id: 'ask-title' }, title),
        text && el('p', {}, text),
        input && el('label', {}, field, input),
        el('div', { class: 'buttons' },
          el('button', { type: 'button', class: 'quiet', onclick: () => dialog.close('') }, 'Cancel'),
          el('button', { class: danger ? 'danger' : 'primary' }, confirm))))
    dialog.addEventListener('close', () => {
      dialog.remove()
      resolve(dialog.returnValue === 'yes' ? (input ? input.value : true) : null)
    })
    document.body.append(dialog)
    dialog.showModal()
    input?.select()
  })
}
