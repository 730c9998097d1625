// Images for models that see, made small enough to be sent and kept.

const LARGEST = 1024  // pixels of the longer side: more than vision models look at

export const imageFiles = (files) => [...files].filter(({ type }) => type.startsWith('image/'))

// A file as a data: URL. Throws where it is no image.
export async function imageFrom(file) {
  const bitmap = await createImageBitmap(file)
  const scale = Math.min(1, LARGEST / Math.max(bitmap.width, bitmap.height))
  const canvas = document.createElement('canvas')
  canvas.width = Math.max(1, Math.round(bitmap.width * scale))
  canvas.height = Math.max(1, Math.round(bitmap.height * scale))
  const context = canvas.getContext('2d')
  context.fillStyle = '#fff'  // behind what is transparent: JPEG has no transparency
  context.fillRect(0, 0, canvas.width, canvas.height)
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height)
  bitmap.close()
  return canvas.toDataURL('image/jpeg', 0.9)
}
