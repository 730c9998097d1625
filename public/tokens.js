// Text as the tokens that it was made of, each tinted by how unsure the model was, and a card that tells which others it
// considered. The card shows on hover, on a tap, and by the arrow keys where a text of tokens has the focus.

import { $, el } from './dom.js'

const CARD_ROWS = 12

const told = new WeakMap()  // what each span of a token is about

// Appends the pieces that an element does not show yet.
export function showTokens(element, pieces) {
  if ((element.pieces ?? 0) > pieces.length) element.replaceChildren()
  for (const piece of pieces.slice(element.childElementCount ? element.pieces : 0)) element.append(tokenSpan(piece))
  element.pieces = pieces.length
}

// A piece's span. Several tokens may make up one piece, as with characters of many bytes.
export function tokenSpan(piece) {
  const span = el('span', { class: 'token' }, piece.text)
  const probs = piece.tokens.map(({ prob }) => prob ?? 0)
  span.style.setProperty('--doubt', (1 - Math.min(...probs, 1)).toFixed(3))
  told.set(span, piece.tokens)
  return span
}

// ---- the card -------------------------------------------------------------------------------------------------------------

let shown = null  // the span whose card is open

export function showCard(span) {
  if (span === shown) return
  hideCard()
  const tokens = told.get(span)
  if (!tokens?.length) return
  const card = $('token-card')
  card.replaceChildren(...tokens.map(table))
  card.hidden = false
  const { left, bottom, top } = span.getBoundingClientRect()
  const { width, height } = card.getBoundingClientRect()
  const below = bottom + height + 12 < innerHeight
  card.style.left = `${Math.max(8, Math.min(left - 12, innerWidth - width - 8))}px`
  card.style.top = `${below ? bottom + 6 : Math.max(8, top - height - 6)}px`
  span.classList.add('shown')
  shown = span
}

export function hideCard() {
  $('token-card').hidden = true
  shown?.classList.remove('shown')
  shown = null
}

export const cardIsOpen = () => shown !== null

function table({ text, prob, top }) {
  const rows = top.slice(0, CARD_ROWS)
  const isListed = rows.some(([other]) => other === text)
  if (!isListed) rows.unshift([text, prob])
  return el('table', {}, el('tbody', {}, ...rows.map(([other, p]) => {
    const bar = el('span', { class: 'bar' })
    bar.style.setProperty('--p', p ?? 0)
    return el('tr', other === text ? { class: 'chosen', 'aria-label': 'chosen' } : {},
      el('th', { scope: 'row' }, visible(other)),
      el('td', {}, p === null ? 'less' : percent(p)),
      el('td', { class: 'bar-cell' }, bar))
  })))
}

const percent = (p) => (p >= 0.0995 ? `${(100 * p).toFixed(0)} %` : p >= 0.001 ? `${(100 * p).toFixed(1)} %` : '< 0.1 %')

// White space can be seen, and so can nothing.
function visible(text) {
  return text.replaceAll(' ', '␣').replaceAll('\n', '↵').replaceAll('\t', '⇥') || '∅'
}

// Opens and closes the card for the tokens in an element.
export function followTokens(element) {
  element.addEventListener('pointerover', ({ target, pointerType }) => {
    if (target.classList.contains('token') && pointerType !== 'touch') showCard(target)
  })
  element.addEventListener('pointerleave', hideCard)
  element.addEventListener('click', ({ target }) => {
    if (target.classList.contains('token')) showCard(target)
    else hideCard()
  })
  element.addEventListener('scroll', hideCard)
  element.addEventListener('focusout', hideCard)
  element.addEventListener('keydown', (event) => {
    const { key, target } = event
    if (!target.classList.contains('tokens') || !['ArrowLeft', 'ArrowRight', 'Home', 'End'].includes(key)) return
    const spans = [...target.querySelectorAll('.token')]
    if (spans.length === 0) return
    event.preventDefault()
    const now = shown ? spans.indexOf(shown) : key === 'ArrowLeft' ? spans.length : -1
    const next = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: spans.length - 1 }[key]
    const span = spans[Math.max(0, Math.min(spans.length - 1, next))]
    span.scrollIntoView({ block: 'nearest' })
    showCard(span)
  })
}
