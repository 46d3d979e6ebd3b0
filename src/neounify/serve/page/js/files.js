/** Images as data URLs: from files, to files. */

export function imageFiles(files) {
  return [...files].filter((file) => file.type.startsWith("image/"));
}

/** A data URL; rejects for what the browser cannot show. */
export async function readImage(file) {
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
  const image = new Image();
  image.src = url;
  await image.decode();
  return url;
}

export function toBlob(dataUrl) {
  const [head, content] = dataUrl.split(",", 2);
  const bytes = Uint8Array.from(atob(content), (char) => char.charCodeAt(0));
  return new Blob([bytes], { type: head.slice("data:".length).split(";")[0] });
}

export function toFile(dataUrl, stem) {
  const blob = toBlob(dataUrl);
  const ending = blob.type.split("/")[1] || "png";
  return new File([blob], `${stem}.${ending}`, { type: blob.type });
}

export function download(dataUrl, stem) {
  const file = toFile(dataUrl, stem);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = file.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
