/** A photograph: by the telephone's own camera, or in a window of the page where there is a webcam. */

const [dialog, video, shutter] = ["camera", "viewfinder", "shutter"].map((id) => document.getElementById(id));

/** Call `take(file)` with each picture that is taken, `fail` if there is no camera. */
export function photographs(take, fail) {
  document.getElementById("photograph").addEventListener("click", async () => {
    // getUserMedia is there on https and localhost alone
    if (matchMedia("(pointer: coarse)").matches || !navigator.mediaDevices) {
      document.getElementById("capture").click();
      return;
    }
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    } catch {
      fail();
      return;
    }
    shutter.disabled = true;
    dialog.showModal();
  });
  video.addEventListener("loadeddata", () => {
    shutter.disabled = false;
    shutter.focus();
  });
  shutter.addEventListener("click", () => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
    canvas.getContext("2d").drawImage(video, 0, 0);
    canvas.toBlob((blob) => take(new File([blob], "photograph.jpg", { type: blob.type })), "image/jpeg", 0.95);
    dialog.close();
  });
  document.getElementById("camera-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    for (const track of video.srcObject?.getTracks() ?? []) track.stop();
    video.srcObject = null;
  });
}
