// Opens a ring buffer and has nothing else to do.
import {native} from '../../../src/native.js';
import {fixture} from '../helpers.js';

const object = native.openObject(fixture('small_kinds'));
object.load();
const reader = native.openRingBuffer(object.map('ring'), () => {});
if (process.argv[2] === 'unref') {
	reader.unref();
}
