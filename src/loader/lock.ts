import {mkdirSync} from 'node:fs';
import {LockedError, hasErrno} from '../errors.js';
import {native} from '../native.js';
import type {PinLayout} from './paths.js';

/** Proof that this process is the one writer. Functions that write take it as an argument. */
export interface WriterLock {
	readonly layout: PinLayout;
	release(): void;
}

/**
Takes the lock on `<bpffs>/sidestep`, which it makes if need be. Held until released or until the process ends, however it ends.

@throws LockedError when another process has it.
*/
export function takeWriterLock(layout: PinLayout): WriterLock {
	mkdirSync(layout.base, {recursive: true, mode: 0o700});
	let fd: number | undefined;
	try {
		fd = native.lock(layout.base, 'exclusive');
	} catch (error) {
		throw hasErrno(error, 'EAGAIN', 'EWOULDBLOCK') ? new LockedError(layout.base, {cause: error}) : error;
	}

	return {
		layout,
		release() {
			if (fd !== undefined) {
				native.closeFd(fd);
				fd = undefined;
			}
		},
	};
}

/** Whether some process holds the writer lock, i.e. an agent runs. */
export function isAgentRunning(layout: PinLayout): boolean {
	try {
		native.closeFd(native.lock(layout.base, 'shared'));
		return false;
	} catch (error) {
		return hasErrno(error, 'EAGAIN', 'EWOULDBLOCK');
	}
}
