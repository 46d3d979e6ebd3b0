/** Images and videos as data URLs, generated videos as blob URLs: from files, to files, shown. */

import { h } from "./dom.js";

/** The files of images, and of videos where a mode takes them. */
export function mediaFiles(files, takesVideos) {
  const kinds = takesVideos ? /^(image|video)\// : /^image\//;
  return [...files].filter((file) => kinds.test(file.type));
}

export function isVideo(url) {
  return url.startsWith("data:video/");
}

/** An image, or the first frame of a video. */
export function shown(url, i) {
  if (!isVideo(url)) return h("img", { src: url, alt: `Image ${i + 1}` });
  const video = h("video", { src: url, preload: "auto", "aria-label": `Video ${i + 1}` });
  video.muted = true;
  return video;
}

export function toDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

/** A data URL; rejects for an image that the browser cannot show. The server knows more videos. */
export async function readMedia(file) {
  const url = await toDataUrl(file);
  if (isVideo(url)) return url;
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
  const url = URL.createObjectURL(file);
  save(url, file.name);
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** Save what is behind a blob URL. */
export function save(url, name) {
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
}
